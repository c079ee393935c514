// Judges itself on golden vectors, .safetensors or .txt. Exit codes: 0 all right, 1 wrong, 2 nothing judged.
import { readFileSync } from "node:fs";

function fromSafetensors(bytes) { // 8 bytes of length, JSON, little-endian floats
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const start = 8 + Number(view.getBigUint64(0, true));
  const header = JSON.parse(bytes.subarray(8, start).toString("utf8"));
  delete header.__metadata__;
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: [begin, end] }] of Object.entries(header)) {
    if (dtype !== "F32") throw new Error(`${name}: expected F32, got ${dtype}`);
    const entry = (_, i) => view.getFloat32(start + begin + 4 * i, true);
    const value = Float64Array.from({ length: (end - begin) / 4 }, entry);
    tensors[name] = { shape, value };
  }
  return tensors;
}

function fromText(text) { // name axes sizes exponent, then integers
  const words = text.split(/\s+/).filter((word) => word), tensors = {};
  for (let at = 0; at < words.length; ) {
    const name = words[at++], axes = Number(words[at++]);
    const shape = words.slice(at, at + axes).map(Number), exponent = Number(words[at + axes]);
    const size = shape.reduce((a, b) => a * b, 1), first = at + axes + 1;
    const value = Float64Array.from(words.slice(first, first + size), (word) => Number(word) * 2 ** exponent);
    tensors[name] = { shape, value };
    at = first + size;
  }
  return tensors;
}

const matrix = (rows, columns, value, at) => ({ rows, columns, at: at ?? ((i, j) => value[i * columns + j]) });
const T = (m) => matrix(m.columns, m.rows, null, (i, j) => m.at(j, i));
function make(rows, columns, f) {
  const value = new Float64Array(rows * columns);
  for (let i = 0; i < rows; i++) for (let j = 0; j < columns; j++) value[i * columns + j] = f(i, j);
  return { ...matrix(rows, columns, value), value };
}
const times = (a, b) => make(a.rows, b.columns, (i, j) => {
  let sum = 0;
  for (let l = 0; l < a.columns; l++) sum += a.at(i, l) * b.at(l, j);
  return sum;
});

function layer(t) { // the arrays of one test -> y, gx, gA, gB
  const [dOut, dIn] = t.W.shape, r = t.A.shape[0], N = dIn ? t.x.value.length / dIn : 0, s = t.s.value[0];
  const x = matrix(N, dIn, t.x.value), gy = matrix(N, dOut, t.gy.value);
  const W = matrix(dOut, dIn, t.W.value), A = matrix(r, dIn, t.A.value), B = matrix(dOut, r, t.B.value);
  const mask = t.mask ? matrix(N, dIn, t.mask.value) : { at: () => 1 };
  const xd = make(N, dIn, (i, j) => x.at(i, j) * mask.at(i, j));
  const z = times(xd, T(A)), u = times(z, T(B)), base = times(x, T(W));
  const bias = (j) => t.b?.value[j] ?? 0, biasOfB = (j) => t.bB?.value[j] ?? 0;
  const y = make(N, dOut, (i, j) => base.at(i, j) + bias(j) + s * (u.at(i, j) + biasOfB(j)));
  const gu = make(N, dOut, (i, j) => s * gy.at(i, j));
  const gz = times(gu, B), gB = times(T(gu), z), gA = times(T(gz), xd);
  const through = times(gz, A), direct = times(gy, W);
  const gx = make(N, dIn, (i, j) => direct.at(i, j) + through.at(i, j) * mask.at(i, j));
  return { y, gx, gA, gB };
}

const path = process.argv[2];
const tensors = path.endsWith(".txt") ? fromText(readFileSync(path, "utf8")) : fromSafetensors(readFileSync(path));
const tests = {};
for (const [name, tensor] of Object.entries(tensors)) {
  const [id, ...rest] = name.split(".");
  (tests[id] ??= {})[rest.join(".")] = tensor;
}
let judged = 0, wrong = 0;
for (const [id, t] of Object.entries(tests)) {
  if (!t.gx || t.m) continue; // to be refused, or DoRA
  judged++;
  for (const [name, got] of Object.entries(layer(t))) {
    const want = t[name].value, sigma = t[`sigma.fp32.${name}`]?.value; // bit for bit where there is no sigma
    const off = want.filter((w, i) => !(Math.abs(got.value[i] - w) <= (sigma ? 8 * sigma[i] : 0))).length;
    if (off) console.log(`${id}.${name}: ${off} of ${want.length} differ`);
    wrong += off;
  }
}
console.log(`${judged} layers judged, ${wrong} entries wrong`);
process.exit(wrong ? 1 : judged ? 0 : 2);
