// Tasks whose answer is text: how they are asked, what a grammar allows next, entities read out of an answer.
// Nothing here knows the page.

// What the base's template does to a message (Frame in scripts/pockettune/data/task_template.py).
export const STRIPS = { "": (t) => t, lstrip: (t) => t.trimStart(), rstrip: (t) => t.trimEnd(), strip: (t) => t.trim() };

/** The prompt of texts by name, control tokens in them broken: {text}, or {text, question}. */
export function promptOf(task, texts) {
  const filled = task.parts.map((part) =>
    part.replace(/\{(\w+)\}/g, (place, name) => (name !== "text" && task.texts?.includes(name) ? texts[name] : place)));
  return promptOfContent(task, filled.join(texts.text));
}

/** The prompt of all that the user says. */
export function promptOfContent({ head, strip, tail }, content) {
  return head + STRIPS[strip](content) + tail;
}

/** The prompt of a conversation that ends with the user (Turns in scripts/pockettune/data/turns.py). */
export function promptOfTalk({ turns }, messages) {
  const written = messages.map(({ role, content }, place) => {
    const said = STRIPS[turns.strips[role]](content);
    if (role === "system") return turns.system[0] + said + turns.system[1];
    const start = place === 0 ? turns.start : "";
    return start + said + (role === "assistant" ? turns.following : place === messages.length - 1 ? turns.tail : turns.between);
  });
  return written.join("");
}

/** The conversation without its oldest exchange; null where there is but one. */
export function withoutOldest(messages) {
  const first = messages[0].role === "system" ? 1 : 0;
  return messages.length > first + 2 ? messages.toSpliced(first, 2) : null;
}

// ---------------------------------------------------------------- a text that is too long

/**
 * What is asked about a text that is too long, as it was in the evaluation (Answer.questions in
 * scripts/pockettune/tasks/answer.py): windows, of which two overlap by about `stride` tokens. `ask` makes of a
 * part of the text {ids, ...}, of at most `room` ids. Null where there is no room for windows.
 */
export async function askInWindows(text, stride, room, ask) {
  const characters = [...text];
  const frame = (await ask("")).ids.length;
  const aToken = characters.length / Math.max((await ask(text)).ids.length - frame, 1); // characters
  const overlap = Math.floor(stride * aToken);
  for (let width = Math.floor((room - frame) * aToken); width > overlap; width = Math.min(width - 1, Math.floor(width * 0.95))) {
    const windows = [], step = width - overlap;
    const begins = Array.from({ length: Math.ceil((characters.length - overlap) / step) }, (_, n) => n * step);
    for (const begin of begins) {
      const asked = await ask(characters.slice(begin, begin + width).join(""));
      if (asked.ids.length > room) break; // some parts have more tokens than others
      windows.push(asked);
    }
    if (windows.length === begins.length) return windows;
  }
  return null;
}

const likely = ({ scores }) => scores.reduce((sum, score) => sum + score, 0);

/** Of what was written about windows, the likeliest answer that is one, else that there is none (Answer.combine). */
export function takeLikeliest(written, noAnswer) {
  const answers = written.filter(({ answer }) => !["", noAnswer].includes(answer.trim()));
  if (answers.length > 0) return answers.reduce((best, next) => (likely(next) > likely(best) ? next : best));
  return written.find(({ answer }) => answer.trim() === noAnswer) ?? written[0];
}

// ---------------------------------------------------------------- entities

/**
 * The entities of an answer, [["type","name"],...] (scripts/pockettune/tasks/entity_answers.py), that stand in the
 * text: [{type, name, start, end}], or null where it is not of that form. Of an answer that did not end, those that did.
 */
export function readEntities(answer, text, task, ended = true) {
  const types = Object.values(task.types);
  const named = ended ? asPairs(answer, types) : salvagePairs(answer, types);
  if (!named) return null;
  const placed = [];
  let behind = 0;
  for (const [type, name] of named) {
    let start = freePlace(name, text, behind, placed);
    if (start < 0) start = freePlace(name, text, 0, placed);
    if (start < 0) continue;
    behind = start + name.length;
    placed.push({ type, name, start, end: behind });
  }
  return placed;
}

function salvagePairs(answer, types) {
  for (let end = answer.lastIndexOf("]"); end > 0; end = answer.lastIndexOf("]", end - 1)) {
    const found = asPairs(`${answer.slice(0, end)}]]`, types);
    if (found) return found;
  }
  return null;
}

function asPairs(answer, types) {
  let found;
  try {
    found = JSON.parse(answer);
  } catch {
    return null;
  }
  const pairs = Array.isArray(found) && found.every((pair) =>
    Array.isArray(pair) && pair.length === 2 && types.includes(pair[0]) && typeof pair[1] === "string");
  return pairs ? found : null;
}

function freePlace(name, text, from, placed) {
  let start = name ? text.indexOf(name, from) : -1;
  while (start >= 0 && placed.some((other) => start < other.end && other.start < start + name.length))
    start = text.indexOf(name, start + 1);
  return start;
}

// ---------------------------------------------------------------- writing an answer

/**
 * The likeliest answer behind a prompt's ids: {answer, said, ended, scores}, its ids and their log
 * probabilities, the end's too. `wanted` is asked before each token.
 */
export async function writeAnswer(model, ids, { grammar = null, onText = () => {}, wanted = () => true } = {}) {
  const { wllama, task } = model;
  const said = [], scores = [];
  let answer = "", rest = new Uint8Array(), state = grammar?.start, ended = false;
  while (!ended && said.length < task.max_tokens && wanted()) {
    await model.compute([...ids, ...said]);
    const next = await likeliest(wllama, grammar, state, rest);
    if (!Number.isFinite(next.p)) throw new Error("NaN");
    scores.push(Math.log(Math.max(next.p, 1e-38)));
    ended = next.ends;
    if (ended) break;
    said.push(next.token);
    answer += next.text;
    rest = next.rest;
    if (grammar) state = grammar.after(state, next.text);
    onText(answer);
  }
  return { answer, said, ended, scores };
}

/** The likeliest next token, of those that the grammar allows: {token, p, ends, text, rest}. */
async function likeliest(wllama, grammar, state, before) {
  let seen = 0;
  for (const count of [1, 64, -1]) { // the likeliest of all is seldom not allowed; -1: all
    const found = await wllama.getLogits(count);
    for (const { token, p } of found.slice(seen)) {
      const ends = wllama.isTokenEOG(token);
      const [text, rest] = ends ? ["", before] : splitCharacters(before, await wllama.detokenize([token]));
      if (!grammar || allows(grammar, state, ends, text, rest)) return { token, p, ends, text, rest };
    }
    seen = found.length;
  }
  throw new Error("no token is allowed by the grammar");
}

function allows(grammar, state, ends, text, rest) {
  if (ends) return state.includes(null);
  if (text === "" && rest.length === 0) return false;
  const next = grammar.after(state, text);
  return rest.length > 0 ? grammar.mayBegin(next, characterRange(rest)) : next.length > 0;
}

/** The first and the last character that may begin with these bytes of UTF-8; none behind a stray byte. */
function characterRange([lead, ...others]) {
  const length = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
  if (lead < 0xc2 || lead > 0xf4 || others.length + 1 >= length || others.some((byte) => byte >> 6 !== 2)) return [1, 0];
  const shift = 6 * (length - 1 - others.length);
  const first = others.reduce((code, byte) => (code << 6) | (byte & 63), lead & (0xff >> (length + 1))) << shift;
  return [Math.max(first, [0x80, 0x800, 0x10000][length - 2]), first + 2 ** shift - 1];
}

/** The whole characters of bytes, and the bytes of one that is not whole yet. */
function splitCharacters(before, piece) {
  const bytes = new Uint8Array([...before, ...piece]);
  for (let left = 0; left < Math.min(4, bytes.length + 1); left++) {
    try {
      const whole = bytes.subarray(0, bytes.length - left);
      return [new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(whole), bytes.slice(bytes.length - left)];
    } catch {} // one byte less
  }
  return [new TextDecoder().decode(bytes), new Uint8Array()];
}

// ---------------------------------------------------------------- what was scored

/** What is otherwise than scored: null, "near" where they part at a token that was nearly another, or the cause. */
export function compareText(row, { prompt, ids, said, ended }, near) {
  if (prompt !== row.prompt) return "why_prompt";
  if (ids.join() !== row.prompt_ids.join()) return "why_ids";
  const place = row.answer_ids.findIndex((id, n) => id !== said[n]);
  const parting = place >= 0 ? place : said.length > row.answer_ids.length || ended !== row.ended ? row.answer_ids.length : -1;
  if (parting < 0) return null;
  return row.margins[parting] < near ? "near" : "why_answer";
}

/** The same of a text that was asked about in windows. */
export function compareWindows(row, { windows, answer }, { near, no_answer }) {
  if (windows.map(({ prompt }) => prompt).join("\n") !== row.windows.map(({ prompt }) => prompt).join("\n")) return "why_windows";
  const found = row.windows.map((window, place) => compareText(window, windows[place], near)).filter((why) => why !== null);
  if (found.length > 0) return found.find((why) => why !== "near") ?? "near";
  const taken = answer.trim() === no_answer ? "" : answer.trim();
  if (taken === (row.answer ?? "")) return null;
  const scored = row.windows.map((window) => ({ answer: window.answer, scores: window.log_probabilities }));
  const other = takeLikeliest(scored.filter((window) => window.answer === answer), no_answer);
  return likely(takeLikeliest(scored, no_answer)) - likely(other) < near ? "near" : "why_choice";
}

// ---------------------------------------------------------------- a grammar

/**
 * llama.cpp's grammars (GBNF): which characters may come next. wllama 2.3.7 has them too, but its sampler does
 * not go on in a grammar behind the first token. A state is a list of stacks, each what is still to come, the
 * next element first: {element, next}, null where the answer may end.
 */
export class Grammar {
  constructor(text) {
    this.rules = parseGrammar(text);
    this.start = this.#expand({ element: { rule: "root" }, next: null });
  }

  /** Stacks whose next element is a character, or that are empty. */
  #expand(stack, found = []) {
    if (stack === null || stack.element.ranges) {
      found.push(stack);
      return found;
    }
    const { element, next } = stack;
    if (element.repeated) {
      const { repeated, least, most } = element;
      if (least === 0) this.#expand(next, found);
      if (most === 0) return found;
      const rest = { element: { repeated, least: Math.max(0, least - 1), most: most - 1 }, next };
      return this.#expand({ element: repeated, next: rest }, found);
    }
    for (const sequence of element.choices ?? this.rules[element.rule])
      this.#expand(sequence.reduceRight((rest, part) => ({ element: part, next: rest }), next), found);
    return found;
  }

  /** The state behind a text; empty where it is not allowed. */
  after(state, text) {
    for (const character of text) {
      const code = character.codePointAt(0);
      state = state.flatMap((stack) => {
        if (stack === null) return [];
        const { ranges, not } = stack.element;
        return ranges.some(([first, last]) => first <= code && code <= last) !== not ? this.#expand(stack.next) : [];
      });
    }
    return state;
  }

  /** Whether a character between two codes, whose first bytes are known, may come next. */
  mayBegin(state, [low, high]) {
    return low <= high && state.some((stack) => {
      if (stack === null) return false;
      const { ranges, not } = stack.element;
      return not ? !ranges.some(([first, last]) => first <= low && high <= last) : ranges.some(([first, last]) => first <= high && low <= last);
    });
  }
}

const TOKENS = /"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|::=|[\w-]+|\{\d+(?:,\d*)?\}|[|()*+?.]|\n|#.*/g;
const CHARACTER = /\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\([^])|([^])/gu;
const ESCAPES = { n: "\n", r: "\r", t: "\t" };
const TIMES = { "*": [0, Infinity], "+": [1, Infinity], "?": [0, 1] };

/** {rule: [[element]]}; an element is {ranges, not}, {rule}, {choices} or {repeated, least, most}. */
function parseGrammar(text) {
  const tokens = text.match(TOKENS).filter((token) => !token.startsWith("#"));
  const rules = {};
  let place = 0;
  const readChoices = (depth) => {
    const choices = [[]];
    for (; place < tokens.length; place++) {
      const token = tokens[place], sequence = choices.at(-1);
      if (token === "|") choices.push([]);
      else if (token === ")") break;
      else if (token === "\n") {
        if (depth === 0 && !["|", "::="].includes(tokens[place - 1])) break;
      } else if (TIMES[token] || token[0] === "{") {
        const [least, most = least] = TIMES[token] ?? token.slice(1, -1).split(",").map((n) => (n === "" ? Infinity : Number(n)));
        sequence.push({ repeated: sequence.pop(), least, most });
      } else if (token === "(") {
        place++;
        sequence.push({ choices: readChoices(depth + 1) });
      } else sequence.push(readElement(token));
    }
    return choices;
  };
  while (place < tokens.length) {
    const name = tokens[place++];
    if (name === "\n") continue;
    if (tokens[place++] !== "::=") throw new Error(`grammar: no rule ${name}`);
    rules[name] = readChoices(0);
  }
  return rules;
}

function readElement(token) {
  if (token === ".") return { ranges: [[0, 0x10ffff]], not: false };
  if (token[0] === '"') return { choices: [readCharacters(token.slice(1, -1)).map(({ code }) => ({ ranges: [[code, code]], not: false }))] };
  if (token[0] !== "[") return { rule: token };
  const not = token[1] === "^";
  const codes = readCharacters(token.slice(not ? 2 : 1, -1));
  const ranges = [];
  while (codes.length > 0) {
    const first = codes.shift();
    const last = codes[0]?.dash && codes.length > 1 ? codes.splice(0, 2)[1] : first;
    ranges.push([first.code, last.code]);
  }
  return { ranges, not };
}

/** [{code, dash}] of the inside of a literal or a class; dash: one that stands for a range. */
function readCharacters(text) {
  return [...text.matchAll(CHARACTER)].map(([, hex, long, escape, plain]) => {
    const code = hex || long ? parseInt(hex ?? long, 16) : (ESCAPES[escape] ?? escape ?? plain).codePointAt(0);
    return { code, dash: plain === "-" };
  });
}
