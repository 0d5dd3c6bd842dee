// Embeds a text twice, with the client's default encoding (base64) and as floats, and prints as one JSON line:
// the length and norm of the first, and the largest difference between the two.
// Usage: node embeddings.mjs MODEL, with OPENAI_BASE_URL and OPENAI_API_KEY set.
import OpenAI from "openai";

const [model] = process.argv.slice(2);
const client = new OpenAI();
const input = "The quick brown fox jumps over the lazy dog.";
const byDefault = (await client.embeddings.create({ model, input })).data[0].embedding;
const asFloats = (await client.embeddings.create({ model, input, encoding_format: "float" })).data[0].embedding;
console.log(
  JSON.stringify({
    length: byDefault.length,
    norm: Math.hypot(...byDefault),
    difference: Math.max(...byDefault.map((value, i) => Math.abs(value - asFloats[i]))),
  }),
);
