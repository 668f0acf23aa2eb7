// Tokens of a conversation, those of `encode_messages` in bitllm/conversations.py ---------------
// llama.cpp reads a prompt as a text, in which "<|im_start|>" is the mark, whoever wrote it. So it
// is given a vocabulary in which the marks have other names, with a character that no message has.
// The page itself counts tokens, to know which turns fit into the context.

const BLANK = "[\\p{White_Space}\\x1c-\\x1f]+"; // what Python's strip() takes away
const ENDS = new RegExp(`^${BLANK}|${BLANK}$`, "gu");
const WORDS = new RegExp( // GPT-2's
  "'(?:s|t|re|ve|m|ll|d)| ?\\p{L}+| ?\\p{N}+| ?[^\\p{White_Space}\\p{L}\\p{N}]+" +
    "|\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}+", "gu");

/** A message as the model is given it. */
const cleaned = (text) => text.replace(ENDS, "").replace(/\p{Surrogate}/gu, "\ufffd")
  .replace(new RegExp(`[${told.marks}]`, "g"), "\ufffd");

/** What a GGUF file says before its tensors: values but for numbers, and where strings begin. */
async function headOf(file) {
  const SIZES = [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8], STRING = 8, ARRAY = 9;
  const view = new DataView(await file.slice(0, 1 << 26).arrayBuffer());
  const utf8 = new TextDecoder(), values = {}, places = {};
  let place = 16, strings = []; // after magic, version and the number of tensors
  const take = (bytes) => (place += bytes) - bytes;
  const long = () => Number(view.getBigUint64(take(8), true));
  const text = () => {
    const length = long();
    strings.push(place);
    return utf8.decode(new Uint8Array(view.buffer, take(length), length));
  };
  const valueOf = (type) => {
    if (type === STRING) return text();
    if (type !== ARRAY) return void take(SIZES[type]);
    const inside = view.getUint32(take(4), true);
    return Array.from({ length: long() }, () => valueOf(inside));
  };
  for (let left = long(); left; left--) {
    const key = text();
    strings = places[key] = [];
    values[key] = valueOf(view.getUint32(take(4), true));
  }
  return { values, places, bytes: new Uint8Array(view.buffer, 0, place) };
}

/** GPT-2's printable character for each byte. */
function alphabet() {
  const plain = (b) => (b > 32 && b < 127) || (b > 160 && b !== 173);
  let others = 0;
  return Array.from({ length: 256 }, (_, b) => String.fromCodePoint(plain(b) ? b : 256 + others++));
}

class Tokenizer {
  /** chat: the ids that a conversation is made of. */
  constructor(head, chat) {
    this.chat = chat;
    this.tokens = head.values["tokenizer.ggml.tokens"];
    this.ids = new Map(this.tokens.map((token, id) => [token, id]));
    const merges = head.values["tokenizer.ggml.merges"];
    this.ranks = new Map(merges.map((merge, rank) => [merge, rank]));
    this.letters = alphabet();
  }
  /** The tokens of a word: of all neighbours those merge first that were learned first. */
  merged(word) {
    let parts = [...word];
    for (;;) {
      let first = Infinity;
      for (let i = 1; i < parts.length; i++) {
        first = Math.min(first, this.ranks.get(`${parts[i - 1]} ${parts[i]}`) ?? Infinity);
      }
      if (first === Infinity) return parts;
      const joined = [];
      for (let i = 0; i < parts.length; i++) {
        const met = this.ranks.get(`${parts[i]} ${parts[i + 1]}`) === first;
        joined.push(met ? parts[i] + parts[++i] : parts[i]);
      }
      parts = joined;
    }
  }
  encode(text) {
    const bytes = (word) => Array.from(new TextEncoder().encode(word), (b) => this.letters[b]);
    const tokens = (text.match(WORDS) ?? []).flatMap((word) => this.merged(bytes(word)));
    return tokens.map((token) => this.ids.get(token));
  }
  turn({ role, content }) {
    return [this.chat.start, ...this.encode(`${role}\n`), ...this.encode(cleaned(content)),
      this.chat.end, ...this.encode("\n")];
  }
  /** The tokens to answer to. */
  conversation(messages) {
    const answer = [this.chat.start, ...this.encode("assistant\n")];
    return [...messages.flatMap((message) => this.turn(message)), ...answer];
  }
  /** The same as a text for llama.cpp, whose vocabulary has the names that `renamed` gave. */
  text(messages) {
    const [start, end] = [this.chat.start, this.chat.end].map((id) => newName(this.tokens[id]));
    const turns = messages.map(({ role, content }) =>
      `${start}${role}\n${cleaned(content)}${end}\n`);
    return `${turns.join("")}${start}assistant\n`;
  }
}

const newName = (token) => told.marks[0] + token.slice(3);

/** The file with names of the special tokens that nobody can type; nothing moves in it. */
function renamed(file, { bytes, places }, special) {
  const mark = new TextEncoder().encode(told.marks[0]); // three bytes
  for (const id of special) bytes.set(mark, places["tokenizer.ggml.tokens"][id]);
  return new Blob([bytes, file.slice(bytes.length)]);
}

/** The model's tokenizer, and its file as llama.cpp is given it. */
async function tokenized(file, chat) {
  const head = await headOf(file);
  return [new Tokenizer(head, chat), renamed(file, head, chat.special)];
}

