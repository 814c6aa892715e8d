// The page: a text is asked about as it was in training, by the same llama.cpp, compiled for browsers.
// Nothing leaves the device; index.html's Content-Security-Policy sees to that.
import {
  Grammar, askInWindows, compareText, compareWindows, promptOf, promptOfContent, promptOfTalk, readEntities, takeLikeliest, withoutOldest, writeAnswer,
} from "./text.js";
import { Wllama } from "./wllama.js";

// ---------------------------------------------------------------- words

export const WORDS = {
  en: {
    private: "Everything stays on this device: what you type is sent nowhere.",
    text: "Text",
    ask: "Answer",
    remove: "Remove the model from this device",
    load: "Load the model ({size} MB)",
    load_rest: "Load the rest of the model ({size} of {all} MB)",
    again: "Try again",
    loading: "Loading the model: {done} of {all} MB",
    starting: "Starting the model …",
    ready: "Ready.",
    thinking: "Reading …",
    kept_all: "Page and model are kept in this browser: they work without a network.",
    kept_model: "The model is kept in this browser, the page is not: this address is not https. It works while the computer serves it.",
    kept_none: "This browser keeps nothing (a private window, or no room): the model is loaded again next time.",
    removed: "The model was removed from this device.",
    cut_off: "The connection was cut at {done} of {all} MB; what is here is kept. Go on when the network is back.",
    changed: "The model on the server is not the one that this page was made for. Reload the page.",
    damaged: "A part of the stored model was damaged; it is loaded again.",
    no_wasm: "This browser has no WebAssembly, or it is switched off (lockdown mode). Take a recent Chrome, Firefox, Edge or Safari.",
    no_memory: "There is not enough memory for this model. Close other tabs and apps, then try again; or take a smaller file.",
    no_start: "The model does not start: {reason}. Reload the page; if that does not help, remove the model and load it again.",
    other_task: "This model is of another task ({kind}) than this page can show.",
    other_model: "The model beside this page was trained for another task. Make the app again.",
    no_files: "A file of this page is missing or damaged ({reason}). Make the app again, or reload the page.",
    took: "{seconds} s, {tokens} tokens",
    unsure: "not sure",
    cut: "only the first {count} characters were read: the model knows no longer texts",
    empty: "Type or paste a text.",
    many: "Many texts: a table",
    many_how: "Paste rows of a spreadsheet, or choose a csv file; the first row names the columns. You get it back with two columns more.",
    table: "Rows",
    file: "or a file (csv, tsv)",
    column: "Column of the text",
    run: "Answer all",
    stop: "Stop",
    save: "Save answers.csv",
    rows: "{done} of {all} rows",
    rows_left: "{done} of {all} rows, about {left} left",
    stopped: "Stopped: {done} of {all} rows are answered.",
    no_rows: "There is no row below the names of the columns.",
    no_table: "This is no table that can be read: {reason}.",
    quote_open: "a quote that begins in row {row} does not end",
    not_text: "it is not text (UTF-8, UTF-16 or GB 18030)",
    answer_column: "answer",
    probability_column: "probability",
    shown: "The first {shown} of {all} rows are shown; the file has them all.",
    minutes: "{count} min",
    seconds: "{count} s",
    check: "Does it answer as it was scored?",
    check_how: "{count} rows that were scored when this model was made are asked here again.",
    check_run: "Ask them",
    check_running: "{done} of {all} asked",
    check_good: "{same} of {rows} answered as scored. Largest difference of a log probability: {largest}.",
    check_near: "{same} of {rows} answered as scored, {near} otherwise whose labels were so close that another build may. Largest difference of a log probability: {largest}.",
    check_bad: "{same} of {rows} answered as scored; first other row: {first} ({why}). Largest difference of a log probability: {largest}.",
    why_prompt: "the prompt differs",
    why_ids: "the tokens differ",
    why_answer: "the answer differs",
    why_windows: "the windows of its text differ",
    why_choice: "another window's answer was taken",
    question: "Question",
    message: "Message",
    send: "Send",
    clear: "New conversation",
    conversation: "Conversation",
    you: "You",
    model: "Model",
    no_question: "Type a question.",
    long_question: "The question is too long: no room is left for the text.",
    window: "Reading window {place} of {count} of the text …",
    windows: "the text is too long to be read at once: it was read in {count} windows that overlap, and the likeliest answer taken",
    no_answer: "The text has no answer.",
    nothing: "Nothing was found in the text.",
    silent: "The model wrote nothing.",
    other_form: "The answer is not of the form that was trained:",
    unended: "the answer was cut off at {count} tokens",
    halted: "stopped",
    halted_early: "Stopped before the model read anything.",
    forgotten: "the oldest messages were left out: the model reads no more",
    many_how_text: "Paste rows of a spreadsheet, or choose a csv file; the first row names the columns. You get it back with a column more.",
    check_near_text: "{same} of {rows} answered as scored, {near} otherwise from a token on that was so close to another that another build may take that. Largest difference of a log probability: {largest}.",
    about: "{name}, {size} MB, {threads} · computed by wllama (MIT licence)",
    threads: "{count} threads",
    thread: "1 thread",
  },
  zh: {
    private: "一切都留在本机：您输入的内容不会发送到任何地方。",
    text: "文本",
    ask: "回答",
    remove: "从本机删除模型",
    load: "加载模型（{size} MB）",
    load_rest: "继续加载模型（{all} MB 中还剩 {size} MB）",
    again: "重试",
    loading: "正在加载模型：{done} / {all} MB",
    starting: "正在启动模型……",
    ready: "就绪。",
    thinking: "正在阅读……",
    kept_all: "页面和模型都已保存在此浏览器中：没有网络也能用。",
    kept_model: "模型已保存在此浏览器中，页面没有：此地址不是 https。电脑提供服务期间可用。",
    kept_none: "此浏览器不保存任何内容（无痕窗口，或空间不足）：下次需重新加载模型。",
    removed: "模型已从本机删除。",
    cut_off: "连接在 {done} / {all} MB 处中断；已有部分已保留。网络恢复后可继续。",
    changed: "服务器上的模型不是此页面对应的那个。请重新加载页面。",
    damaged: "已保存的模型有一部分损坏，正在重新加载该部分。",
    no_wasm: "此浏览器没有 WebAssembly，或它已被关闭（锁定模式）。请使用较新的 Chrome、Firefox、Edge 或 Safari。",
    no_memory: "内存不足以运行此模型。请关闭其他标签页和应用后重试，或换用更小的文件。",
    no_start: "模型无法启动：{reason}。请重新加载页面；若仍不行，请删除模型后重新加载。",
    other_task: "此模型的任务（{kind}）此页面无法显示。",
    other_model: "页面旁的模型是为另一个任务训练的。请重新制作此应用。",
    no_files: "此页面缺少文件或文件损坏（{reason}）。请重新制作此应用，或重新加载页面。",
    took: "{seconds} 秒，{tokens} 个词元",
    unsure: "不确定",
    cut: "只读了前 {count} 个字符：模型不能读更长的文本",
    empty: "请输入或粘贴文本。",
    many: "多条文本：表格",
    many_how: "粘贴电子表格中的行，或选择 csv 文件；第一行是列名。得到的表格会多出两列。",
    table: "表格内容",
    file: "或选择文件（csv、tsv）",
    column: "文本所在的列",
    run: "全部回答",
    stop: "停止",
    save: "保存 answers.csv",
    rows: "{done} / {all} 行",
    rows_left: "{done} / {all} 行，约剩 {left}",
    stopped: "已停止：已回答 {done} / {all} 行。",
    no_rows: "列名下面没有数据行。",
    no_table: "无法读取此表格：{reason}。",
    quote_open: "第 {row} 行开始的引号没有结束",
    not_text: "它不是文本（UTF-8、UTF-16 或 GB 18030）",
    answer_column: "回答",
    probability_column: "概率",
    shown: "显示了 {all} 行中的前 {shown} 行；文件中包含全部。",
    minutes: "{count} 分钟",
    seconds: "{count} 秒",
    check: "回答与评测时一致吗？",
    check_how: "制作此模型时评测过的 {count} 行，在这里再问一遍。",
    check_run: "开始",
    check_running: "已问 {done} / {all}",
    check_good: "{rows} 行中 {same} 行与评测时回答相同。对数概率的最大差：{largest}。",
    check_near: "{rows} 行中 {same} 行与评测时回答相同，{near} 行不同，但其标签非常接近，换一个构建版本就可能不同。对数概率的最大差：{largest}。",
    check_bad: "{rows} 行中 {same} 行与评测时回答相同；第一条不同的行：{first}（{why}）。对数概率的最大差：{largest}。",
    why_prompt: "提示词不同",
    why_ids: "词元不同",
    why_answer: "回答不同",
    why_windows: "文本的片段不同",
    why_choice: "取了另一个片段的回答",
    question: "问题",
    message: "消息",
    send: "发送",
    clear: "新对话",
    conversation: "对话",
    you: "您",
    model: "模型",
    no_question: "请输入问题。",
    long_question: "问题太长，文本已放不下。",
    window: "正在阅读文本的第 {place} 个片段，共 {count} 个……",
    windows: "文本太长，一次读不完：分成 {count} 个互相重叠的片段来读，取了其中概率最大的回答",
    no_answer: "文本中没有答案。",
    nothing: "文本中没有找到。",
    silent: "模型没有写任何内容。",
    other_form: "回答不是训练时的格式：",
    unended: "回答在 {count} 个词元处被截断",
    halted: "已停止",
    halted_early: "已停止，模型尚未阅读。",
    forgotten: "最早的消息未读：模型读不了更多",
    many_how_text: "粘贴电子表格中的行，或选择 csv 文件；第一行是列名。得到的表格会多出一列。",
    check_near_text: "{rows} 行中 {same} 行与评测时回答相同，{near} 行从某个词元起不同，但该词元与另一个非常接近，换一个构建版本就可能不同。对数概率的最大差：{largest}。",
    about: "{name}，{size} MB，{threads} · 由 wllama（MIT 许可证）计算",
    threads: "{count} 个线程",
    thread: "1 个线程",
  },
};
const LANGUAGE = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
const MARKS = LANGUAGE === "zh" ? { notes: "；", names: "、" } : { notes: "; ", names: ", " }; // between two

function say(key, values = {}) {
  return WORDS[LANGUAGE][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** A sentence for the user, on its way up to where it is shown. */
class Told extends Error {
  constructor(key, values) {
    super(say(key, values));
    this.key = key;
  }
}

const $ = (id) => document.getElementById(id);
const megabytes = (bytes) => (bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0);
const percent = new Intl.NumberFormat(LANGUAGE, { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });

function show(id, visible = true) {
  $(id).hidden = !visible;
}

function tell(id, text) {
  $(id).textContent = text; // never as HTML: labels and texts are anybody's
  show(id, text !== "");
}

// ---------------------------------------------------------------- the model's parts, kept in the browser

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

/** As zlib.crc32. Not SHA-256, which browsers have only where the address is https. */
function crc32(bytes) {
  let crc = -1;
  for (let i = 0; i < bytes.length; i++) crc = CRC_TABLE[(crc ^ bytes[i]) & 255] ^ (crc >>> 8);
  return (crc ^ -1) >>> 0;
}

const settled = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

/** A request succeeds before its bytes are written; where there is no room for them, its transaction aborts. */
const written = (store) =>
  new Promise((resolve, reject) => {
    store.transaction.oncomplete = resolve;
    store.transaction.onabort = () => reject(store.transaction.error);
  });

/**
 * The parts of one model, `app.json` says which. In IndexedDB, because it is there without https too and
 * gives them back one by one: a phone never holds the file twice. In memory where it cannot be used.
 */
class Parts {
  static async open(model) {
    const parts = new Parts();
    Object.assign(parts, { model, memory: new Map(), present: new Set(), database: null });
    try {
      const request = indexedDB.open(`pockettune ${new URL(".", location.href).pathname}`, 1);
      request.onupgradeneeded = () => request.result.createObjectStore("parts");
      parts.database = await settled(request);
      await parts.#dropOthers();
    } catch {
      parts.database = null; // a private window of some browsers
      parts.present.clear();
    }
    return parts;
  }

  #store(mode = "readonly") {
    return this.database.transaction("parts", mode).objectStore("parts");
  }

  #key(index) {
    return `${this.model.sha256} ${String(index).padStart(6, "0")}`;
  }

  async #dropOthers() {
    for (const key of await settled(this.#store().getAllKeys())) {
      const [sha256, index] = key.split(" ");
      if (sha256 === this.model.sha256) this.present.add(Number(index));
      else await settled(this.#store("readwrite").delete(key));
    }
  }

  get count() {
    return this.model.crc32.length;
  }
  /** Bytes of one part. */
  size(index) {
    return Math.min(this.model.part_bytes, this.model.bytes - index * this.model.part_bytes);
  }
  get bytes() {
    return [...this.present].reduce((sum, index) => sum + this.size(index), 0);
  }
  get kept() {
    return this.database !== null && this.memory.size === 0;
  }
  firstMissing(from = 0) {
    for (let index = from; index < this.count; index++) if (!this.present.has(index)) return index;
    return this.count;
  }
  firstPresent(from) {
    for (let index = from; index < this.count; index++) if (this.present.has(index)) return index;
    return this.count;
  }

  isWhole(index, bytes) {
    return bytes?.length === this.size(index) && crc32(bytes) === this.model.crc32[index];
  }

  async put(index, bytes) {
    try {
      const store = this.#store("readwrite");
      store.put(bytes, this.#key(index));
      await written(store);
    } catch {
      this.memory.set(index, bytes); // no database, or no room in it
    }
    this.present.add(index);
  }

  /** A part as it was put; null, and forgotten, where it is damaged. */
  async take(index) {
    let bytes = this.memory.get(index);
    if (!bytes && this.database) bytes = await settled(this.#store().get(this.#key(index))).catch(() => null);
    if (this.isWhole(index, bytes)) return bytes;
    this.present.delete(index);
    return null;
  }

  async clear() {
    this.memory.clear();
    this.present.clear();
    if (this.database) await settled(this.#store("readwrite").clear());
  }

  /** What wllama takes for the file: it asks for size and stream() alone. */
  asBlob() {
    let next = 0;
    const pull = async (controller) => {
      const bytes = await this.take(next);
      if (bytes === null) return controller.error(new Told("damaged"));
      controller.enqueue(bytes.slice()); // a copy, because wllama gives it away to its worker
      if (++next === this.count) controller.close();
    };
    return { size: this.model.bytes, stream: () => new ReadableStream({ pull }, { highWaterMark: 0 }) };
  }
}

// ---------------------------------------------------------------- loading it

const TRIES = 4; // in a row without a new part; waits of 1, 2 and 4 seconds between them
const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/** Load the parts that are missing, again and again where the connection is cut. */
async function loadParts(parts, onProgress) {
  for (let tries = 0; parts.firstMissing() < parts.count; ) {
    const before = parts.present.size;
    try {
      await loadFrom(parts, parts.firstMissing(), onProgress);
    } catch (error) {
      if (error instanceof Told) throw error;
      tries = parts.present.size > before ? 1 : tries + 1;
      if (tries === TRIES || navigator.onLine === false)
        throw new Told("cut_off", { done: megabytes(parts.bytes), all: megabytes(parts.model.bytes) });
      await pause(500 * 2 ** tries);
    }
  }
}

/** Load from one part up to the next that is here, in one request. */
async function loadFrom(parts, first, onProgress) {
  const { part_bytes, bytes: all } = parts.model;
  const end = Math.min(parts.firstPresent(first) * part_bytes, all);
  const range = `bytes=${first * part_bytes}-${end - 1}`;
  const response = await fetch(parts.model.file, { headers: { Range: range }, cache: "no-store" });
  if (response.status === 416) throw new Told("changed"); // it is shorter now
  if (response.status === 404) throw new Told("no_files", { reason: parts.model.file });
  if (!response.ok) throw new Error(`status ${response.status}`);
  // A server that knows no ranges sends the file from its start: 200 instead of 206.
  let index = response.status === 206 ? first : 0;
  let part = new Uint8Array(parts.size(index));
  let filled = 0;
  const reader = response.body.getReader();
  for (let chunk; !(chunk = await reader.read()).done; ) {
    for (let rest = chunk.value; rest.length > 0 && index < parts.count; ) {
      const taken = rest.subarray(0, part.length - filled);
      part.set(taken, filled);
      filled += taken.length;
      rest = rest.subarray(taken.length);
      if (filled < part.length) continue;
      if (!parts.present.has(index)) {
        if (!parts.isWhole(index, part)) throw new Told("changed");
        await parts.put(index, part);
      }
      if (++index < parts.count) part = new Uint8Array(parts.size(index));
      filled = 0;
    }
    onProgress(parts.bytes + (parts.present.has(index) ? 0 : filled));
  }
  if (index < parts.count && index * part_bytes < end) throw new Error("cut off");
}

// ---------------------------------------------------------------- asking it

/** The shortest starts of the labels' prefixes behind which a probability is looked up. */
function sharedStarts(prefixes) {
  const starts = prefixes.flatMap((ids) => ids.map((_, length) => ids.slice(0, length)));
  return [...new Map(starts.map((ids) => [ids.join(), ids])).values()];
}

function beginsWith(ids, start) {
  return ids.length > start.length && start.every((id, place) => ids[place] === id);
}

function softmax(values) {
  const peak = Math.max(...values);
  const parts = values.map((value) => Math.exp(value - peak));
  const sum = parts.reduce((a, b) => a + b);
  return parts.map((part) => part / sum);
}

const escaped = (text) => text.replace(/[.*+?^${}()|[\]\\/]/g, "\\$&");

/** The character with which a control token begins; what follows is only looked at (starts_pattern in prompts.py). */
function startsPattern(tokens) {
  const split = tokens.map((token) => [...token].map(escaped));
  const starts = split.map(([first, ...rest]) => `${first}(?=${rest.join("")})`);
  return new RegExp(starts.join("|") || "(?!)", "gu");
}

const LIKELIEST = 256; // asked for first; all of the vocabulary only where a label is not among them
const CHARACTERS_A_TOKEN = 100; // no text has more: longer ones are cut before they are tokenized

class Model {
  static async start(task, page, parts) {
    const model = new Model();
    Object.assign(model, { task, cached: [] });
    model.words = task.labels ?? [];
    model.prefixes = model.words.map((word) => page.labels[word]);
    model.longest = page.longest_prompt;
    model.starts = sharedStarts(model.prefixes);
    model.control = startsPattern(task.control);
    model.grammar = task.grammar ? new Grammar(task.grammar) : null;
    try {
      await model.#load(parts);
      const { meta } = model.wllama.getModelMetadata();
      if ((meta["pockettune.task.prompt"] ?? "") !== task.prompt) throw new Told("other_model");
    } catch (error) {
      model.stop();
      throw error;
    }
    return model;
  }

  async #load(parts) {
    const quiet = () => {};
    let fail;
    const failed = new Promise((_, reject) => (fail = reject));
    // wllama tells of a worker that could not start by its logger alone, and waits for ever.
    const logger = { debug: quiet, log: quiet, warn: quiet, error: (...told) => fail(new Error(told.map((t) => t?.message ?? t).join(" "))) };
    const paths = { "single-thread/wllama.wasm": "wllama.wasm", "multi-thread/wllama.wasm": "wllama-threads.wasm" };
    this.wllama = new Wllama(paths, { logger, suppressNativeLog: true });
    const answer = this.words.length > 0 ? Math.max(...this.prefixes.map((ids) => ids.length)) : this.task.max_tokens;
    const room = this.longest + answer;
    const options = { n_ctx: room, n_batch: room, n_threads: threads() };
    await Promise.race([this.wllama.loadModel([parts.asBlob()], options), failed]);
  }

  get threads() {
    return this.wllama.isMultithread() ? this.wllama.getNumThreads() : 1;
  }

  /** The text as it may stand in a prompt: it must not end the turn it is in. */
  defuse(text) {
    return text.replace(this.control, "$& ");
  }

  async encode(prompt) {
    const ids = [...(await this.wllama.tokenize(prompt, true))];
    const bos = this.wllama.getBOS();
    if (this.wllama.mustAddBosToken() && ids[0] !== bos) ids.unshift(bos);
    return { prompt, ids };
  }

  /**
   * The prompt and its ids, the text cut from its end where it is too long; `cut`: characters read, or null.
   * `write` makes the prompt of a text.
   */
  async prompt(text, write = (read) => promptOf(this.task, { text: read })) {
    const room = this.longest;
    const most = room * CHARACTERS_A_TOKEN;
    const characters = [...this.defuse(text.slice(0, most))];
    let best = await this.encode(write(characters.join("")));
    let fits = characters.length;
    if (best.ids.length > room) {
      [fits, best] = [0, await this.encode(write(""))];
      for (let beyond = characters.length; beyond - fits > 1; ) {
        const middle = (fits + beyond) >> 1;
        const tried = await this.encode(write(characters.slice(0, middle).join("")));
        if (tried.ids.length <= room) [fits, best] = [middle, tried];
        else beyond = middle;
      }
      if (best.ids.length > room) throw new Told("long_question");
    }
    return { ...best, cut: fits < characters.length || text.length > most ? fits : null };
  }

  /** Compute up to the end of `ids`; what the last call had at its start is kept. */
  async compute(ids) {
    let same = 0;
    while (same < this.cached.length && same < ids.length - 1 && this.cached[same] === ids[same]) same++;
    if (same === 0) await this.wllama.kvClear();
    else if (same < this.cached.length) await this.wllama.kvRemove(same, -1);
    this.cached = ids.slice(0, same); // should the next line fail
    await this.wllama.decode(ids.slice(same), {});
    this.cached = ids;
  }

  async #probabilities(wanted) {
    for (const count of [LIKELIEST, -1]) {
      const found = new Map((await this.wllama.getLogits(count)).map(({ token, p }) => [token, p]));
      if (count === -1 || wanted.every((id) => found.has(id))) return found;
    }
  }

  /**
   * Each label's log probability up to where it is decided (scripts/pockettune/evaluation/scoring.py), and
   * its probability among the labels.
   */
  async ask(text) {
    const began = performance.now();
    const { prompt, ids, cut } = await this.prompt(text);
    const scores = this.words.map(() => 0);
    for (const start of this.starts) {
      const nexts = this.prefixes.flatMap((p, label) => (beginsWith(p, start) ? [[label, p[start.length]]] : []));
      await this.compute([...ids, ...start]);
      const found = await this.#probabilities(nexts.map(([, id]) => id));
      for (const [label, id] of nexts) scores[label] += Math.log(Math.max(found.get(id), 1e-38));
    }
    if (!scores.every(Number.isFinite)) throw new Told("no_start", { reason: "NaN" });
    const probabilities = softmax(scores.map((score) => score / (this.task.temperature ?? 1)));
    const best = scores.indexOf(Math.max(...scores));
    const seconds = (performance.now() - began) / 1000;
    return { answer: this.words[best], probability: probabilities[best], probabilities, scores, prompt, ids, cut, seconds };
  }

  /**
   * Write the answer about texts: writeAnswer's of the window that was taken, with its prompt and ids, with cut,
   * seconds, all `windows` (most often one), and how many are `left`, where it was stopped.
   */
  async write(texts, { onWindow = () => {}, onText, wanted = () => true, ...options } = {}) {
    const began = performance.now();
    const asked = await this.#questions(texts, wanted);
    const windows = [];
    for (const [place, one] of asked.entries()) {
      if (asked.length > 1) onWindow(place + 1, asked.length);
      const how = { grammar: this.grammar, onText: asked.length > 1 ? undefined : onText, wanted, ...options };
      const written = await writeAnswer(this, one.ids, how);
      if (place > 0 && !wanted()) break; // what was being written is no answer
      windows.push({ cut: null, ...one, ...written });
    }
    const taken = takeLikeliest(windows, this.task.no_answer);
    return { ...taken, windows, left: asked.length - windows.length, seconds: (performance.now() - began) / 1000 };
  }

  /** The prompts about texts, with their ids: windows where the text is too long and the task knows them, else one. */
  async #questions(texts, wanted) {
    const { task } = this;
    const others = Object.fromEntries(Object.entries(texts).map(([name, text]) => [name, this.defuse(text)]));
    const write = (text) => promptOf(task, { ...others, text });
    if (task.stride !== undefined && task.no_answer !== undefined) {
      const ask = (text) => {
        if (!wanted()) throw new Told("halted_early"); // a book has thousands of windows
        return this.encode(write(text));
      };
      const whole = await ask(others.text);
      if (whole.ids.length <= this.longest) return [whole];
      const windows = await askInWindows(others.text, task.stride, this.longest, ask);
      if (windows !== null) return windows;
    }
    return [await this.prompt(texts.text, write)];
  }

  /** Write the answer to a conversation; `forgotten`: whether its oldest messages were left out. */
  async reply(messages, options) {
    const began = performance.now();
    let kept = messages.map(({ role, content }) => ({ role, content: this.defuse(content) }));
    let asked = await this.encode(promptOfTalk(this.task, kept));
    for (let less; asked.ids.length > this.longest && (less = withoutOldest(kept)) !== null; ) {
      kept = less;
      asked = await this.encode(promptOfTalk(this.task, kept));
    }
    const forgotten = kept.length < messages.length;
    if (asked.ids.length > this.longest)
      asked = await this.prompt(messages.at(-1).content, (content) => promptOfTalk(this.task, [...kept.slice(0, -1), { role: "user", content }]));
    const written = { cut: null, ...asked, ...(await writeAnswer(this, asked.ids, { grammar: this.grammar, ...options })) };
    return { ...written, windows: [written], left: 0, forgotten, seconds: (performance.now() - began) / 1000 };
  }

  /** Answer a row of conformance.jsonl as it was scored: without a grammar. */
  async replay(row) {
    const { task } = this;
    const prompt = row.messages ? promptOfTalk(task, row.messages)
      : task.template === "task" ? promptOf(task, { text: this.defuse(row.message) }) : promptOfContent(task, row.message);
    const asked = await this.encode(prompt);
    return { ...asked, ...(await writeAnswer(this, asked.ids)) };
  }

  /** Give its memory back; not waited for, because a worker that failed never answers. */
  stop() {
    this.wllama.exit().catch(() => {});
  }
}

/** One where the page is not isolated, and on iOS, whose pages run out of memory with more. */
function threads() {
  const ios = /iPhone|iPad|iPod/.test(navigator.userAgent) || (navigator.platform === "MacIntel" && navigator.maxTouchPoints > 1);
  if (!self.crossOriginIsolated || ios) return 1;
  return Math.max(1, Math.min(4, Math.floor((navigator.hardwareConcurrency || 1) / 2)));
}

// ---------------------------------------------------------------- tables

/** Rows of a csv (RFC 4180) or tsv; the delimiter is the one that the first row has most of. */
function readTable(text) {
  text = text.replace(/^\uFEFF/, "");
  const head = text.split(/\r?\n/, 1)[0].replace(/"[^"]*"/g, "");
  const counts = [",", "\t", ";"].map((mark) => [head.split(mark).length, mark]);
  const delimiter = counts.reduce((best, next) => (next[0] > best[0] ? next : best))[1];
  const rows = [];
  let row = [], cell = "", quoted = false, began = 0;
  const endCell = () => { row.push(cell); cell = ""; };
  const endRow = () => { endCell(); if (row.length > 1 || row[0].trim() !== "") rows.push(row); row = []; };
  for (let i = 0; i < text.length; i++) {
    const c = text[i];
    if (quoted) {
      if (c !== '"') cell += c;
      else if (text[i + 1] === '"') { cell += '"'; i++; }
      else quoted = false;
    } else if (c === '"' && cell === "") { quoted = true; began = rows.length + 1; }
    else if (c === delimiter) endCell();
    else if (c === "\n" || (c === "\r" && text[i + 1] !== "\n")) endRow();
    else if (c !== "\r") cell += c;
  }
  if (quoted) throw new Told("no_table", { reason: say("quote_open", { row: began }) });
  if (cell !== "" || row.length > 0) endRow();
  if (rows.length < 2) throw new Told("no_rows");
  return rows;
}

/** A csv that spreadsheets open with its characters right, and whose cells they do not compute. */
function writeTable(rows) {
  const write = (cell) => {
    const formula = /^[=+\-@\t\r]/.test(cell) && !/^[+-]?[\d.,]+%?$/.test(cell);
    const text = formula ? `'${cell}` : cell;
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return `\uFEFF${rows.map((row) => row.map(write).join(",")).join("\r\n")}\r\n`;
}

/** The text of a file as spreadsheets save it. */
function decodeText(buffer) {
  const bytes = new Uint8Array(buffer);
  const marked = { "255,254": "utf-16le", "254,255": "utf-16be" }[bytes.slice(0, 2).join()];
  for (const encoding of marked ? [marked] : ["utf-8", "gb18030"]) {
    try {
      const text = new TextDecoder(encoding, { fatal: true }).decode(bytes);
      if (!text.includes("\0")) return text;
    } catch {} // the next one
  }
  throw new Told("no_table", { reason: say("not_text") });
}

// ---------------------------------------------------------------- the page

const SHOWN = 50; // rows of a table; the file has them all
export const app = { task: null, page: null, checks: [], parts: null, model: null, registered: null, rows: null, wanted: false, talk: [] };

/** The content of a JSON file, or of each line. */
async function readFile(name) {
  try {
    const response = await fetch(name);
    if (!response.ok) throw new Error(`status ${response.status}`);
    const text = await response.text();
    return name.endsWith("l") ? text.split("\n").filter(Boolean).map((line) => JSON.parse(line)) : JSON.parse(text);
  } catch (error) {
    throw new Told("no_files", { reason: `${name}: ${error.message}` });
  }
}

/** Say all that index.html names, and what differs by the task in its words. */
function fillWords(task) {
  document.documentElement.lang = LANGUAGE === "zh" ? "zh-CN" : "en";
  if (task?.turns) Object.assign($("text_label").dataset, { words: "message" });
  if (task?.turns) Object.assign($("answer").dataset, { words: "send" });
  if (task?.turns) $("text").rows = 3; // below the conversation
  if (task && !task.labels) $("many_how").dataset.words = "many_how_text";
  $("talk").setAttribute("aria-label", say("conversation"));
  for (const id of ["said", "answers"]) $(id).classList.toggle("text", task !== undefined && !task.labels);
  show("asked", task?.texts?.includes("question") ?? false);
  for (const element of document.querySelectorAll("[data-words]")) element.textContent = say(element.dataset.words);
}

/** Disable what would ask the model while it is asked. */
function busy(state) {
  for (const id of ["answer", "run", "check_run", "remove", "clear"]) $(id).disabled = state;
  if (!state) $("run").disabled = app.rows === null;
}

function explain(error) {
  if (error instanceof Told) return error.message;
  const reason = String(error?.message ?? error);
  if (/out of memory|OOM|bad_alloc|could not allocate|cannot (enlarge|allocate)|allocation failed/i.test(reason)) return say("no_memory");
  return say("no_start", { reason: reason || error?.name || "?" });
}

function offerLoading(message) {
  const { bytes } = app.parts.model;
  const here = app.parts.bytes;
  tell("status", message);
  show("progress", here > 0 && here < bytes);
  $("progress").value = here / bytes;
  const left = megabytes(bytes - here);
  $("load").textContent = here === 0 ? say("load", { size: megabytes(bytes) })
    : here < bytes ? say("load_rest", { size: left, all: megabytes(bytes) }) : say("again");
  show("load");
  show("remove", here > 0);
}

async function loadModel() {
  show("load", false);
  navigator.storage?.persist?.().catch(() => {}); // else the browser may drop it when room is short
  const { bytes: all } = app.parts.model;
  show("progress");
  await loadParts(app.parts, (done) => {
    $("progress").value = done / all;
    $("status").textContent = say("loading", { done: megabytes(done), all: megabytes(all) });
  });
  show("progress", false);
  tell("status", say("starting"));
  app.model = await Model.start(app.task, app.page, app.parts);
}

/** Load and start; a damaged part is loaded again, once. */
async function start() {
  try {
    await loadModel().catch((error) => {
      if (error.key !== "damaged") throw error;
      tell("status", error.message);
      return loadModel();
    });
  } catch (error) {
    return offerLoading(explain(error));
  }
  tell("status", say("ready"));
  tellWhatIsKept();
  const count = app.model.threads;
  const named = count > 1 ? say("threads", { count }) : say("thread");
  tell("about", say("about", { name: app.parts.model.name, size: megabytes(app.parts.model.bytes), threads: named }));
  for (const id of ["ask", "many", "check", "remove"]) show(id);
  if (app.task.turns || app.task.texts?.includes("question")) show("many", false); // a row is one text
  busy(false);
}

async function tellWhatIsKept() {
  const page = (await app.registered) && (await navigator.serviceWorker.ready);
  tell("kept", say(!app.parts.kept ? "kept_none" : page ? "kept_all" : "kept_model"));
}

function stopModel(message) {
  app.model?.stop();
  app.model = null;
  for (const id of ["ask", "many", "check", "result", "kept"]) show(id, false);
  offerLoading(message);
}

async function removeModel() {
  await app.parts.clear();
  stopModel(say("removed"));
}

/** Run `work` with the model; where that fails say so at `place`, and offer to start it anew. */
async function withModel(place, work) {
  busy(true);
  try {
    await work(app.model);
  } catch (error) {
    if (error instanceof Told) tell(place, error.message);
    else stopModel(explain(error));
  } finally {
    busy(false);
  }
}

function isSure(result) {
  return app.task.threshold === null || result.probability >= app.task.threshold;
}

async function answerText(event) {
  event.preventDefault();
  const text = $("text").value;
  show("result");
  for (const id of ["labels", "marked"]) $(id).replaceChildren();
  tell("took", "");
  if (text.trim() === "") return tell("said", say("empty"));
  if (app.task.turns) return sendMessage(text);
  if (!app.task.labels) return writeAbout({ text, question: $("question").value });
  tell("said", say("thinking"));
  await withModel("said", async (model) => {
    const result = await model.ask(text);
    tell("said", isSure(result) ? result.answer : `${result.answer} (${say("unsure")})`);
    $("labels").replaceChildren(...model.words.map((word, i) => labelItem(word, result.probabilities[i])));
    const took = say("took", { seconds: result.seconds.toFixed(1), tokens: result.ids.length });
    tell("took", result.cut === null ? took : took + MARKS.notes + say("cut", { count: result.cut }));
  });
}

function labelItem(word, probability) {
  const item = document.createElement("li");
  const name = document.createElement("span");
  const share = document.createElement("span");
  const meter = document.createElement("meter");
  name.textContent = word;
  share.textContent = percent.format(probability);
  meter.value = probability;
  meter.setAttribute("aria-label", word);
  item.append(name, share, meter);
  return item;
}

/** Have an answer written at `place`, with a button that stops it. */
async function watched(place, work) {
  app.wanted = true;
  show("halt");
  $("result").setAttribute("aria-busy", "true"); // a screen reader waits for the whole
  await withModel(place, work);
  $("result").removeAttribute("aria-busy");
  show("halt", false);
}

const writing = (place) => ({
  onText: (text) => { place.textContent = text; },
  onWindow: (number, count) => { place.textContent = say("window", { place: number, count }); },
  wanted: () => app.wanted,
});

async function writeAbout(texts) {
  if (app.task.texts.includes("question") && texts.question.trim() === "") return tell("said", say("no_question"));
  tell("said", say("thinking"));
  await watched("said", async (model) => {
    const result = await model.write(texts, writing($("said")));
    showAnswer(texts.text, result);
    tellTook(result);
  });
}

function tellTook({ seconds, windows, left, cut, said, ended, forgotten }) {
  const tokens = windows.reduce((sum, window) => sum + window.ids.length + window.said.length, 0);
  const notes = [say("took", { seconds: seconds.toFixed(1), tokens })];
  if (windows.length > 1) notes.push(say("windows", { count: windows.length }));
  if (cut !== null) notes.push(say("cut", { count: cut }));
  if (forgotten) notes.push(say("forgotten"));
  if (!ended || left > 0) notes.push(app.wanted ? say("unended", { count: said.length }) : say("halted"));
  tell("took", notes.join(MARKS.notes));
}

/** Show an answer as its task is: entities in the text and by type, else what was written. */
function showAnswer(text, { answer, ended }) {
  const { types, no_answer } = app.task;
  if (!types) return tell("said", answer.trim() === no_answer ? say("no_answer") : answer.trim() || say("silent"));
  const found = readEntities(answer, text, app.task, ended);
  if (found === null) return tell("said", `${say("other_form")} ${answer}`);
  tell("said", found.length === 0 ? say("nothing") : "");
  $("marked").replaceChildren(...markedText(text, found));
  const names = {};
  for (const { type, name } of found) (names[type] ??= new Set()).add(name);
  $("labels").replaceChildren(...Object.entries(names).map(([type, set]) => entityItem(type, [...set])));
}

function markedText(text, found) {
  const nodes = [];
  let behind = 0;
  for (const { type, start, end } of [...found].sort((a, b) => a.start - b.start)) {
    const mark = document.createElement("mark");
    const kind = document.createElement("small");
    kind.textContent = type;
    mark.append(text.slice(start, end), kind);
    nodes.push(text.slice(behind, start), mark);
    behind = end;
  }
  return [...nodes, text.slice(behind)];
}

function entityItem(type, names) {
  const item = document.createElement("li");
  item.className = "names";
  const kind = document.createElement("span");
  const list = document.createElement("span");
  kind.textContent = type;
  list.textContent = names.join(MARKS.names);
  item.append(kind, list);
  return item;
}

function addMessage(role, text) {
  const item = document.createElement("li");
  const who = document.createElement("small");
  const said = document.createElement("p");
  item.className = role;
  who.textContent = say(role === "user" ? "you" : "model");
  said.textContent = text;
  item.append(who, said);
  $("talk").append(item);
  show("talk");
  showLast();
  return said;
}

/** Have the end of the conversation in view, which scrolls by itself. */
function showLast() {
  $("talk").scrollTop = $("talk").scrollHeight;
}

/** Send a message of a conversation; one that is not answered at all does not stay in it. */
async function sendMessage(content) {
  tell("said", "");
  const system = app.task.system ? [{ role: "system", content: app.task.system }] : [];
  const asked = [...app.talk, { role: "user", content }];
  addMessage("user", content);
  const place = addMessage("assistant", say("thinking"));
  $("text").value = "";
  show("clear");
  $("talk").setAttribute("aria-busy", "true");
  await watched("said", async (model) => {
    const how = writing(place);
    const onText = (text) => { how.onText(text); showLast(); };
    const result = await model.reply([...system, ...asked], { ...how, onText });
    place.textContent = result.answer.trim() || say("silent");
    showLast();
    app.talk = [...asked, { role: "assistant", content: result.answer }];
    tellTook(result);
  });
  $("talk").removeAttribute("aria-busy");
  if (app.talk.length < asked.length) $("text").value = content;
  if (app.talk.length < asked.length) for (const _ of "ua") $("talk").lastChild.remove();
}

function clearTalk() {
  app.talk = [];
  $("talk").replaceChildren();
  for (const id of ["talk", "clear", "result"]) show(id, false);
  $("text").focus();
}

/** What a table gets for a text: the cells of its new columns. */
async function answerCells(model, text) {
  if (model.words.length === 0) return [text.trim() === "" ? "" : textCell(text, await model.write({ text }, { wanted: () => app.wanted }))];
  const result = text.trim() === "" ? null : await model.ask(text);
  return [result?.answer ?? "", result ? result.probability.toFixed(4) : ""];
}

/** An answer as text: of entities those that stand in the text, a line each; as it is where it cannot be read. */
function textCell(text, { answer, ended }) {
  const found = app.task.types ? readEntities(answer, text, app.task, ended) : null;
  return found?.map(({ type, name }) => `${type}: ${name}`).join("\n") ?? answer;
}

/** Take a table's text: offer its columns, or say what is wrong with it. */
function takeTable(text) {
  app.rows = null;
  show("save", false);
  show("answers", false);
  tell("rows_said", "");
  try {
    if (text.trim() !== "") app.rows = readTable(text);
  } catch (error) {
    tell("rows_said", explain(error));
  }
  const names = app.rows?.[0] ?? [];
  $("column").replaceChildren(...names.map((name, i) => new Option(name, i)));
  const known = names.indexOf(app.page.text_column);
  $("column").value = String(known >= 0 ? known : longestColumn(app.rows));
  $("run").disabled = app.rows === null;
}

/** The column whose cells are longest, in the first rows: most often the text. */
function longestColumn(rows) {
  const sizes = (rows?.[0] ?? []).map((_, i) => rows.slice(1, 21).reduce((sum, row) => sum + (row[i] ?? "").length, 0));
  return Math.max(0, sizes.indexOf(Math.max(...sizes, 0)));
}

async function takeFile(event) {
  const [file] = event.target.files;
  if (!file) return;
  $("table").value = "";
  try {
    takeTable(decodeText(await file.arrayBuffer()));
  } catch (error) {
    takeTable("");
    tell("rows_said", explain(error));
  }
  if (app.rows) tell("rows_said", say("rows", { done: 0, all: app.rows.length - 1 }));
}

async function answerTable() {
  const [names, ...rows] = app.rows;
  const column = Number($("column").value);
  const out = [[...names, say("answer_column"), ...(app.task.labels ? [say("probability_column")] : [])]];
  app.wanted = true;
  show("stop");
  show("save", false);
  show("rows_done");
  const began = performance.now();
  await withModel("rows_said", async (model) => {
    for (const [done, row] of rows.entries()) {
      if (!app.wanted) break;
      const answered = await answerCells(model, row[column] ?? "");
      if (!app.wanted) break; // an answer that was stopped is none
      out.push([...names.map((_, i) => row[i] ?? ""), ...answered]);
      $("rows_done").value = (done + 1) / rows.length;
      const left = ((performance.now() - began) / (done + 1)) * (rows.length - done - 1) / 1000;
      tell("rows_said", say("rows_left", { done: done + 1, all: rows.length, left: span(left) }));
    }
    const done = out.length - 1;
    tell("rows_said", say(done < rows.length ? "stopped" : "rows", { done, all: rows.length }));
    if (done > SHOWN) tell("rows_said", `${$("rows_said").textContent} ${say("shown", { shown: SHOWN, all: done })}`);
  });
  show("stop", false);
  show("rows_done", false);
  offerTable(out, column);
}

function span(seconds) {
  return seconds > 90 ? say("minutes", { count: Math.round(seconds / 60) }) : say("seconds", { count: Math.round(seconds) });
}

/** Show the table, whose texts stand in `column`, and offer it as a file. */
function offerTable(rows, column) {
  const cellsOf = (row, kind) => row.map((text) => Object.assign(document.createElement(kind), { textContent: text }));
  const lines = rows.slice(0, SHOWN + 1).map((row, i) => {
    const line = document.createElement("tr");
    line.append(...cellsOf(row, i === 0 ? "th" : "td"));
    line.cells[column].className = "read";
    return line;
  });
  $("answers").replaceChildren(...lines);
  show("answers");
  URL.revokeObjectURL($("save").href);
  $("save").href = URL.createObjectURL(new Blob([writeTable(rows)], { type: "text/csv" }));
  show("save");
}

/** A row's text: the message itself, or, for the base's own template, what stands in it. */
function textOf(row, { template, parts }) {
  if (template === "task") return row.message;
  const around = parts.reduce((sum, part) => sum + part.length, 0);
  return row.message.substr(parts[0].length, (row.message.length - around) / (parts.length - 1));
}

/** What is otherwise than scored: null, "near" where the two labels were closer than so many nats, or the cause. */
function compare(row, { prompt, ids, answer }, near) {
  if (prompt !== row.prompt) return "why_prompt";
  if (ids.join() !== row.prompt_ids.join()) return "why_ids";
  if (answer === row.answer) return null;
  const lost = row.labels[row.answer].log_probability - row.labels[answer].log_probability;
  return lost < near ? "near" : "why_answer";
}

function count(told, row, why) {
  if (why === null) told.same++;
  else if (why === "near") told.near++;
  else if (told.first === null) [told.first, told.why] = [row.id, why];
}

/** Ask the rows of conformance.jsonl again. Returns {rows, same, near, largest, first, why}. */
async function conform(model, rows, onProgress = () => {}) {
  const told = { rows: rows.length, same: 0, near: 0, largest: 0, first: null, why: null };
  for (const [done, row] of rows.entries()) {
    if (!row.labels) {
      count(told, row, await compareWritten(model, row, told));
      onProgress(done + 1);
      continue;
    }
    const result = await model.ask(textOf(row, model.task));
    count(told, row, compare(row, result, model.task.near));
    for (const [i, word] of model.words.entries())
      told.largest = Math.max(told.largest, Math.abs(result.scores[i] - row.labels[word].log_probability));
    onProgress(done + 1);
  }
  return told;
}

/** Answer a row of text again, in windows where it was: what is otherwise. */
async function compareWritten(model, row, told) {
  const result = row.windows ? await model.write(row.texts, { grammar: null }) : await model.replay(row);
  const pairs = row.windows ? row.windows.map((window, place) => [window, result.windows[place]]) : [[row, result]];
  for (const [scored, now] of pairs) noteDifference(told, scored, now);
  return row.windows ? compareWindows(row, result, model.task) : compareText(row, result, model.task.near);
}

/** Note how far the log probabilities of the tokens are that an answer shares with what was scored. */
function noteDifference(told, row, now) {
  for (const [place, score] of now?.scores.entries() ?? []) {
    told.largest = Math.max(told.largest, Math.abs(score - (row.log_probabilities[place] ?? score)));
    if (now.said[place] !== row.answer_ids[place]) break;
  }
}

async function checkAnswers() {
  await withModel("check_said", async (model) => {
    const progress = (done) => tell("check_said", say("check_running", { done, all: app.checks.length }));
    progress(0);
    const told = await conform(model, app.checks, progress);
    const values = { ...told, largest: told.largest.toFixed(3), why: told.why && say(told.why) };
    const near = app.task.labels ? "check_near" : "check_near_text";
    tell("check_said", say(told.first !== null ? "check_bad" : told.near > 0 ? near : "check_good", values));
    Object.assign($("check").dataset, told);
  });
}

function listen() {
  $("load").addEventListener("click", start);
  $("remove").addEventListener("click", removeModel);
  $("ask").addEventListener("submit", answerText);
  $("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("answer").disabled) $("ask").requestSubmit();
  });
  $("table").addEventListener("input", () => takeTable($("table").value));
  $("file").addEventListener("change", takeFile);
  $("run").addEventListener("click", answerTable);
  for (const id of ["stop", "halt"]) $(id).addEventListener("click", () => (app.wanted = false));
  $("clear").addEventListener("click", clearTalk);
  $("check_run").addEventListener("click", checkAnswers);
}

async function open() {
  fillWords();
  listen();
  tell("status", say("starting"));
  app.registered = navigator.serviceWorker?.register("sw.js").catch(() => null); // there is none over http
  try {
    if (typeof WebAssembly !== "object") throw new Told("no_wasm");
    [app.task, app.page, app.checks] = await Promise.all(["task.json", "app.json", "conformance.jsonl"].map(readFile));
    document.title = app.page.title;
    tell("title", app.page.title);
    if (!app.task.labels && !app.task.texts) throw new Told("other_task", { kind: app.task.type });
    fillWords(app.task);
    $("check").querySelector("p").textContent = say("check_how", { count: app.checks.length });
    app.parts = await Parts.open(app.page.model);
  } catch (error) {
    return tell("status", error instanceof Told ? error.message : say("no_files", { reason: error.message }));
  }
  if (app.parts.firstMissing() === app.parts.count) await start();
  else offerLoading("");
}

await open();
