// Streams a chat completion and prints its deltas as they come, then the usage as one JSON line.
// Usage: node stream.mjs MODEL PROMPT, with OPENAI_BASE_URL and OPENAI_API_KEY set.
import OpenAI from "openai";

const [model, prompt] = process.argv.slice(2);
const client = new OpenAI();
const stream = await client.chat.completions.create({
  model,
  messages: [{ role: "user", content: prompt }],
  temperature: 0,
  max_tokens: 48,
  stream: true,
  stream_options: { include_usage: true },
});
let deltas = 0;
let usage = null;
let finish = null;
for await (const chunk of stream) {
  const [choice] = chunk.choices;
  if (choice?.delta.content) {
    deltas += 1;
    process.stdout.write(choice.delta.content);
  }
  finish = choice?.finish_reason ?? finish;
  usage = chunk.usage ?? usage;
}
console.log(`\n${JSON.stringify({ deltas, finish, usage })}`);
