// LoRA on a linear map as a program: node lora.js in.safetensors out.safetensors.  float32; no library.
// Sums in double precision, one rounding at the end. What it does not cover ends with exit code 77.
const fs = require("fs");

function read(path) {
  const bytes = fs.readFileSync(path);
  const start = 8 + Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.toString("utf8", 8, start));
  const tensors = {};
  for (const [name, entry] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const { dtype, shape, data_offsets: [begin, end] } = entry;
    if (dtype !== "F32") throw new Error(`${name}: expected F32, got ${dtype}`);
    const data = new Float32Array((end - begin) / 4);
    for (let i = 0; i < data.length; i++) data[i] = bytes.readFloatLE(start + begin + 4 * i);
    tensors[name] = { shape, data };
  }
  return { tensors, given: JSON.parse(header.__metadata__.case) };
}

function write(path, tensors) {
  const header = {}, parts = [];
  let offset = 0;
  for (const name of Object.keys(tensors).sort()) {
    const { shape, data } = tensors[name];
    const part = Buffer.alloc(4 * data.length);
    data.forEach((value, i) => part.writeFloatLE(value, 4 * i));
    header[name] = { dtype: "F32", shape, data_offsets: [offset, (offset += part.length)] };
    parts.push(part);
  }
  let text = JSON.stringify(header);
  text += " ".repeat((8 - (text.length % 8)) % 8);
  const head = Buffer.alloc(8);
  head.writeBigUInt64LE(BigInt(text.length));
  fs.writeFileSync(path, Buffer.concat([head, Buffer.from(text), ...parts]));
}

// A matrix is {n, m, at(i, j)}; a product is worked out once.
const matrix = (n, m, at) => ({ n, m, at });
const rows = ({ shape, data }) => {
  const m = shape[shape.length - 1], n = shape.slice(0, -1).reduce((a, b) => a * b, 1);
  return matrix(n, m, (i, j) => data[i * m + j]);
};
const T = (a) => matrix(a.m, a.n, (i, j) => a.at(j, i));
const scale = (f, a) => matrix(a.n, a.m, (i, j) => f * a.at(i, j));
const plus = (a, b) => matrix(a.n, a.m, (i, j) => a.at(i, j) + b.at(i, j));
const times = (a, b) => matrix(a.n, a.m, (i, j) => a.at(i, j) * b.at(i, j));
const dot = (a, b) => {
  const out = new Float64Array(a.n * b.m);
  for (let i = 0; i < a.n; i++)
    for (let j = 0; j < b.m; j++)
      for (let l = 0; l < a.m; l++) out[i * b.m + j] += a.at(i, l) * b.at(l, j);
  return matrix(a.n, b.m, (i, j) => out[i * b.m + j]);
};
const sumOfRows = (a) => matrix(1, a.m, (_, j) => {
  let sum = 0;
  for (let i = 0; i < a.n; i++) sum += a.at(i, j);
  return sum;
});
const tensor = (a, shape) => ({ shape, data: Array.from({ length: a.n * a.m }, (_, i) => a.at(Math.floor(i / a.m), i % a.m)) });

const { tensors: t, given } = read(process.argv[2]);
if (given.dora) {
  console.error("DoRA is not covered");
  process.exit(77);
}
const [x, W, A, B, gy] = ["x", "W", "A", "B", "gy"].map((name) => rows(t[name]));
const mask = t.mask ? rows(t.mask) : matrix(x.n, x.m, () => 1);
const s = given.scaling, xd = times(x, mask), z = dot(xd, T(A));
const shift = (i, j) => (t.b ? t.b.data[j] : 0) + (t.bB ? s * t.bB.data[j] : 0);
const y = plus(plus(dot(x, T(W)), scale(s, dot(z, T(B)))), matrix(x.n, W.n, shift));
const gu = scale(s, gy), gz = dot(gu, B);
write(process.argv[3], Object.fromEntries(Object.entries({
  y: tensor(y, t.gy.shape),
  gx: tensor(plus(dot(gy, W), times(dot(gz, A), mask)), t.x.shape),
  gA: tensor(dot(T(gz), xd), t.A.shape),
  gB: tensor(dot(T(gu), z), t.B.shape),
  gW: tensor(dot(T(gy), x), t.W.shape),
  gb: tensor(sumOfRows(gy), [W.n]),
  gbB: tensor(sumOfRows(gu), [W.n]),
}).filter(([name]) => ["y", "gW", ...given.wanted].includes(name))));
