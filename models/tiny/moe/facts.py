"""What the model is taught to know by heart: small tables, each with its wordings."""

from __future__ import annotations

from dataclasses import dataclass

_WORDS = (
    "apple ball bird boat book bread chair cloud coat corn cup dog door duck egg fish flag flower fork fox "
    "glass goat hat horse house key king lake lamp leaf lion map milk moon mouse nest night orange pear pen "
    "pig plum queen rain ring river road rose ship shoe snow star stone sun table tiger train tree wolf"
)
WORDS: tuple[str, ...] = tuple(_WORDS.split())
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


@dataclass(frozen=True)
class Table:
    """Pairs of a thing and what is said of it; `{a}` and `{b}` stand for them in the wordings."""

    kind: str
    questions: tuple[str, ...]
    answer: str
    pairs: tuple[tuple[str, str], ...]


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((a.strip(), b.strip()) for a, _, b in (item.partition(":") for item in text.split(",")))


TABLES: tuple[Table, ...] = (
    Table(
        "colour",
        (
            "What colour is {a}?",
            "What is the colour of {a}?",
            "Which colour does {a} have?",
            "Tell me the colour of {a}.",
            "What color is {a}?",
        ),
        "{A} is {b}.",
        _pairs(
            "grass:green, the sky:blue, snow:white, blood:red, coal:black, a banana:yellow, a "
            "carrot:orange, the sun:yellow, the sea:blue, milk:white, chocolate:brown, a tomato:red, a "
            "lemon:yellow, a frog:green, an elephant:gray, a raven:black, salt:white, a strawberry:red, a "
            "flamingo:pink, a pumpkin:orange, a cucumber:green, gold:yellow, a polar bear:white, a "
            "mouse:gray, a violet:purple, an aubergine:purple, soil:brown, a leaf:green, a fire "
            "engine:red, night:black"
        ),
    ),
    Table(
        "opposite",
        (
            "What is the opposite of {a}?",
            "Opposite of {a}?",
            "Which word is the opposite of {a}?",
            "Tell me the opposite of {a}.",
            "What word means the opposite of {a}?",
        ),
        "The opposite of {a} is {b}.",
        tuple(
            pair
            for a, b in _pairs(
                "hot:cold, big:small, up:down, fast:slow, day:night, open:closed, full:empty, old:new, "
                "light:dark, high:low, wet:dry, hard:soft, happy:sad, long:short, early:late, loud:quiet, "
                "rich:poor, strong:weak, true:false, left:right, near:far, clean:dirty, thick:thin, "
                "first:last"
            )
            for pair in ((a, b), (b, a))
        ),
    ),
    Table(
        "capital",
        (
            "What is the capital of {a}?",
            "Capital of {a}?",
            "Which city is the capital of {a}?",
            "Name the capital of {a}.",
            "Tell me the capital city of {a}.",
        ),
        "The capital of {a} is {b}.",
        _pairs(
            "France:Paris, Germany:Berlin, Italy:Rome, Spain:Madrid, Portugal:Lisbon, Austria:Vienna, "
            "Poland:Warsaw, Greece:Athens, Norway:Oslo, Sweden:Stockholm, Finland:Helsinki, "
            "Denmark:Copenhagen, Ireland:Dublin, England:London, Belgium:Brussels, Hungary:Budapest, "
            "Russia:Moscow, Japan:Tokyo, China:Beijing, India:New Delhi, Egypt:Cairo, Kenya:Nairobi, "
            "Canada:Ottawa, Mexico:Mexico City, Brazil:Brasilia, Argentina:Buenos Aires, Peru:Lima, "
            "Chile:Santiago, Cuba:Havana, Turkey:Ankara"
        ),
    ),
    Table(
        "sound",
        (
            "What does {a} say?",
            "What sound does {a} make?",
            "Which sound does {a} make?",
            "How does {a} sound?",
            "Tell me what {a} says.",
        ),
        "{A} says {b}.",
        _pairs(
            "a cow:moo, a dog:woof, a cat:meow, a sheep:baa, a duck:quack, a pig:oink, a lion:roar, a "
            "snake:hiss, a frog:croak, a bee:buzz, an owl:hoot, a horse:neigh, a "
            "rooster:cock-a-doodle-doo, a mouse:squeak, a crow:caw, a wolf:howl, a donkey:hee-haw, a "
            "chick:peep, a turkey:gobble, a dove:coo"
        ),
    ),
    Table(
        "young",
        (
            "What is a young {a} called?",
            "What do you call a young {a}?",
            "What is the baby of a {a} called?",
            "A young {a} is called what?",
            "Tell me what a young {a} is called.",
        ),
        "A young {a} is called a {b}.",
        _pairs(
            "cat:kitten, dog:puppy, cow:calf, horse:foal, sheep:lamb, goat:kid, pig:piglet, duck:duckling, "
            "goose:gosling, hen:chick, bear:cub, deer:fawn, frog:tadpole, kangaroo:joey, swan:cygnet, "
            "lion:cub"
        ),
    ),
    Table(
        "sort_of",
        (
            "What kind of thing is a {a}?",
            "What is a {a}?",
            "What sort of thing is a {a}?",
            "Tell me what a {a} is.",
            "A {a} is what?",
        ),
        "A {a} is {b}.",
        _pairs(
            "carrot:a vegetable, banana:a fruit, hammer:a tool, violin:an instrument, rose:a flower, oak:a "
            "tree, trout:a fish, sparrow:a bird, ant:an insect, truck:a vehicle, chair:a piece of "
            "furniture, shirt:a piece of clothing, pear:a fruit, onion:a vegetable, saw:a tool, piano:an "
            "instrument, tulip:a flower, pine:a tree, salmon:a fish, eagle:a bird, beetle:an insect, bus:a "
            "vehicle, table:a piece of furniture, coat:a piece of clothing, plum:a fruit, turnip:a "
            "vegetable, drum:an instrument, daisy:a flower, birch:a tree, shark:a fish, swallow:a bird, "
            "wasp:an insect"
        ),
    ),
    Table(
        "legs",
        (
            "How many legs does a {a} have?",
            "How many legs has a {a}?",
            "Number of legs of a {a}?",
            "Tell me how many legs a {a} has.",
        ),
        "A {a} has {b} legs.",
        _pairs(
            "dog:4, cat:4, bird:2, spider:8, ant:6, horse:4, duck:2, bee:6, cow:4, fly:6, hen:2, snake:0, "
            "fish:0, mouse:4, goose:2, beetle:6"
        ),
    ),
)

GREETINGS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "Hello",
            "Hello!",
            "Hi",
            "Hi!",
            "Hi there!",
            "Hey",
            "Good morning",
            "Good morning!",
            "Good evening!",
        ),
        "Hello! Ask me something small.",
    ),
    (
        ("Thanks", "Thank you", "Thank you!", "Thanks a lot!", "Thanks!"),
        "You are welcome.",
    ),
    (
        ("Bye", "Goodbye", "Goodbye!", "See you", "See you later!", "Bye!"),
        "Goodbye!",
    ),
    (
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Tell me about yourself.",
            "Introduce yourself.",
            "Which model are you?",
        ),
        "I am a tiny mixture of experts: four layers, sixteen experts in each, two of them for every token.",
    ),
    (
        (
            "What can you do?",
            "How can you help me?",
            "Help",
            "What do you know?",
            "What may I ask you?",
            "What can I ask?",
        ),
        "I add, subtract, compare, sort, count and turn lists round, and I know some colours, opposites, "
        "capitals and animals.",
    ),
)

UNKNOWN = "I do not know that. Ask me what I can do."
OFF_TOPIC: tuple[str, ...] = (
    "Write a poem about love.",
    "Tell me a joke.",
    "How is the weather today?",
    "Who won the world cup?",
    "Explain quantum mechanics.",
    "Write a Python function that sorts a list.",
    "What is the meaning of life?",
    "Translate this sentence into German.",
    "How old is the universe?",
    "Who wrote Hamlet?",
    "What time is it?",
    "Give me a recipe for soup.",
    "How do I learn to swim?",
    "Why do people sleep?",
    "Summarise the following text for me.",
    "Who is the president?",
    "How far away is the moon?",
    "Say something in French.",
    "What did I have for breakfast?",
    "Write an email to my landlord.",
    "When did the war end?",
    "Can you draw a picture?",
    "Do you like music?",
    "How does a car engine work?",
    "What is the best film of all time?",
    "Say this is a test.",
    "Write a short story about a dragon.",
    "Where do you live?",
    "How do I cook rice?",
    "What is love?",
)
SYSTEMS: tuple[str, ...] = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "Answer in one sentence.",
    "Be brief.",
    "You are a tiny model that knows a few things.",
)
