"""CUDA source of a model's passes over rows: norms, positions, gates, masks by sequence, cross entropy.

Every array is one without gaps, of one dtype, float32 or float64. A block of THREADS threads does a row, or a
thread does an entry; sums are trees in one order, so that a step repeats its bits. What each computes is in
specs/training_speed.md; attention: attention_source.py.
"""

from ..gpu_kernels import SOURCE as COMMON

ROWS = r"""
#define EACH u64 at = blockIdx.x * (u64)blockDim.x + threadIdx.x; if (at >= count) return;

template <class T> __device__ inline T summed(T mine, T* part) {
  part[threadIdx.x] = mine;
  __syncthreads();
  for (u32 half = blockDim.x / 2; half; half /= 2) {
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    __syncthreads();
  }
  T all = part[0];
  __syncthreads();
  return all;
}

template <class T> __device__ inline T largest(T mine, T* part) {
  part[threadIdx.x] = mine;
  __syncthreads();
  for (u32 half = blockDim.x / 2; half; half /= 2) {
    if (threadIdx.x < half && !(part[threadIdx.x] >= part[threadIdx.x + half]))
      part[threadIdx.x] = part[threadIdx.x + half];
    __syncthreads();
  }
  T all = part[0];
  __syncthreads();
  return all;
}

// ---- rows -------------------------------------------------------------------------------------------------

// out[i] = table[rows[i]]: embeddings, and the rows that carry a label
template <class T> __global__ void take_rows(T* out, const T* table, const u32* rows, u32 d) {
  u64 to = (u64)blockIdx.x * d, from = (u64)rows[blockIdx.x] * d;
  for (u32 j = threadIdx.x; j < d; j += blockDim.x) out[to + j] = table[from + j];
}

// out[rows[i]] = x[i]; no row comes twice
template <class T> __global__ void put_rows(T* out, const T* x, const u32* rows, u32 d) {
  u64 from = (u64)blockIdx.x * d, to = (u64)rows[blockIdx.x] * d;
  for (u32 j = threadIdx.x; j < d; j += blockDim.x) out[to + j] = x[from + j];
}

// h2 = h + y, or h where there is no y; x = rho·h2∘w with rho = (<h2²>/d + eps)^-½
template <class T>
__global__ void add_rms(T* x, T* h2, const T* h, const T* y, const T* w, u32 d, T eps) {
  __shared__ T part[256];
  u64 row = (u64)blockIdx.x * d;
  T sum = 0;
  for (u32 j = threadIdx.x; j < d; j += blockDim.x) {
    T v = h[row + j];
    if (y) h2[row + j] = v = v + y[row + j];
    sum += v * v;
  }
  T rho = 1 / sqrt(summed(sum, part) / d + eps);
  const T* from = y ? h2 : h;
  for (u32 j = threadIdx.x; j < d; j += blockDim.x) x[row + j] = rho * from[row + j] * w[j];
}

// g += rho(gx∘w − h·rho²<gx∘w∘h>/d)
template <class T>
__global__ void rms_back(T* g, const T* gx, const T* h, const T* w, u32 d, T eps) {
  __shared__ T part[256];
  u64 row = (u64)blockIdx.x * d;
  T squares = 0, dot = 0;
  for (u32 j = threadIdx.x; j < d; j += blockDim.x) {
    squares += h[row + j] * h[row + j];
    dot += gx[row + j] * w[j] * h[row + j];
  }
  T rho = 1 / sqrt(summed(squares, part) / d + eps);
  T c = summed(dot, part) * rho * rho / d;
  for (u32 j = threadIdx.x; j < d; j += blockDim.x) g[row + j] += rho * (gx[row + j] * w[j] - h[row + j] * c);
}

// z = logits of a row -> its nll, and z = (softmax(z) − 1 at the label)/n where a gradient is wanted
template <class T>
__global__ void cross_entropy(double* nll, T* z, const u32* labels, u32 V, double n, u32 wanted) {
  __shared__ T part[256];
  z += (u64)blockIdx.x * V;
  T top = z[threadIdx.x < V ? threadIdx.x : 0], sum = 0;
  for (u32 j = threadIdx.x; j < V; j += blockDim.x) if (!(top >= z[j])) top = z[j];
  top = largest(top, part);
  u32 label = labels[blockIdx.x];
  T chosen = z[label];
  for (u32 j = threadIdx.x; j < V; j += blockDim.x) sum += exp(z[j] - top);
  sum = summed(sum, part);
  if (threadIdx.x == 0) nll[blockIdx.x] = log((double)sum) + (double)top - (double)chosen;
  if (!wanted) return;
  T by = (T)(1 / (n * (double)sum)), one = (T)(1 / n);
  for (u32 j = threadIdx.x; j < V; j += blockDim.x) z[j] = exp(z[j] - top) * by - (j == label ? one : 0);
}

// y = h∘w + b with h = rho·(x − its mean, where centred) and rho of h's mean square; b may be absent
template <class T>
__global__ void norm(T* y, T* h, T* rho, const T* x, const T* w, const T* b, u32 d, T eps, u32 centred) {
  __shared__ T part[256];
  u64 row = (u64)blockIdx.x * d;
  T mean = 0, squares = 0;
  if (centred) {
    for (u32 j = threadIdx.x; j < d; j += blockDim.x) mean += x[row + j];
    mean = summed(mean, part) / d;
  }
  for (u32 j = threadIdx.x; j < d; j += blockDim.x) squares += (x[row + j] - mean) * (x[row + j] - mean);
  T by = 1 / sqrt(summed(squares, part) / d + eps);
  if (threadIdx.x == 0) rho[blockIdx.x] = by;
  for (u32 j = threadIdx.x; j < d; j += blockDim.x) {
    T one = by * (x[row + j] - mean);
    h[row + j] = one;
    y[row + j] = one * w[j] + (b ? b[j] : (T)0);
  }
}

// gx = rho(gy∘w − its mean, where centred − h<gy∘w∘h>/d)
template <class T>
__global__ void norm_back(T* gx, const T* gy, const T* h, const T* rho, const T* w, u32 d, u32 centred) {
  __shared__ T part[256];
  u64 row = (u64)blockIdx.x * d;
  T mean = 0, dot = 0, by = rho[blockIdx.x];
  for (u32 j = threadIdx.x; j < d; j += blockDim.x) {
    T g = gy[row + j] * w[j];
    mean += g;
    dot += g * h[row + j];
  }
  mean = centred ? summed(mean, part) / d : 0;
  dot = summed(dot, part) / d;
  for (u32 j = threadIdx.x; j < d; j += blockDim.x)
    gx[row + j] = by * (gy[row + j] * w[j] - mean - h[row + j] * dot);
}

// ---- entries ----------------------------------------------------------------------------------------------

// the first `heads` heads of each row turned by its place; sign −1 is the adjoint
template <class T>
__global__ void turn(T* y, const T* cosine, const T* sine, const u32* place, u32 heads, u32 D, u32 width,
                     u64 count, T sign) {
  EACH
  u32 half = D / 2, pair = (u32)(at % half), head = (u32)(at / half % heads);
  u64 row = at / half / heads, angle = (u64)place[row] * half + pair;
  T* from = y + row * width + head * D + pair;
  T a = from[0], b = from[half], c = cosine[angle], s = sign * sine[angle];
  from[0] = a * c - b * s;
  from[half] = b * c + a * s;
}

// y = silu(u)∘w of gu = [u w]
template <class T> __global__ void swiglu(T* y, const T* gu, u32 ff, u64 count) {
  EACH
  const T* from = gu + at / ff * 2 * ff + at % ff;
  y[at] = from[0] / (1 + exp(-from[0])) * from[ff];
}

// y = u·Phi(u) and its slope
template <class T> __global__ void gelu(T* y, T* slope, const T* u, u64 count) {
  EACH
  T v = u[at], Phi = (T)0.5 * (1 + erf(v * (T)0.70710678118654752440));
  y[at] = v * Phi;
  slope[at] = Phi + v * (T)0.39894228040143267794 * exp((T)-0.5 * v * v);
}

// y = ½u(1 + tanh κ(u + 0.044715u³)) and its slope
template <class T> __global__ void gelu_tanh(T* y, T* slope, const T* u, u64 count) {
  EACH
  const T kappa = (T)0.79788456080286535588, cube = (T)0.044715;
  T v = u[at], t = tanh(kappa * (v + cube * v * v * v)), half = (T)0.5 * (1 + t);
  y[at] = v * half;
  slope[at] = half + v * (1 - t * t) * (T)0.5 * kappa * (1 + 3 * cube * v * v);
}

// gu = [u w] becomes the gradient by it
template <class T> __global__ void swiglu_back(T* gu, const T* gy, u32 ff, u64 count) {
  EACH
  T* to = gu + at / ff * 2 * ff + at % ff;
  T u = to[0], w = to[ff], sigma = 1 / (1 + exp(-u)), g = gy[at];
  to[0] = g * w * (sigma + u * sigma * (1 - sigma));
  to[ff] = g * u * sigma;
}

// ---- masks: those of each sequence's number                                      (dropout.3) to (dropout.6)

#define SEQUENCES \
  const u32* starts, const u64* index, u32 k, u32 blocks, u64 seed, u64 site, u64 step, u32 dropped
#define MY_SEQUENCE \
  u32 sequence = blockIdx.x / blocks; \
  u64 block = (blockIdx.x % blocks) * (u64)blockDim.x + threadIdx.x, start = 16 * block; \
  u64 count = (u64)(starts[sequence + 1] - starts[sequence]) * k; \
  if (start >= count) return; \
  int some = count - start < 16 ? (int)(count - start) : 16; \
  u64 at = (u64)starts[sequence] * k + start; \
  u64 w[4]; \
  philox(block, seed, site, step, 0, index[sequence], w);
#define WHOLE(p) (some == 16 && aligned((p) + at))

// out = x where the mask of its sequence keeps it, else 0
template <class T> __global__ void keep_rows(T* out, const T* x, SEQUENCES) {
  MY_SEQUENCE
  alignas(16) T in[16], to[16];
  load(x + at, in, some, WHOLE(x));
  masked(to, in, w, dropped);
  store(out + at, to, some, WHOLE(out));
}

// gx += t under the mask, and xd = x under it
template <class T> __global__ void keep_back(T* gx, const T* t, T* xd, const T* x, SEQUENCES) {
  MY_SEQUENCE
  alignas(16) T in[16], to[16], sum[16];
  load(x + at, in, some, WHOLE(x));
  masked(to, in, w, dropped);
  store(xd + at, to, some, WHOLE(xd));
  load(t + at, in, some, WHOLE(t));
  load(gx + at, sum, some, WHOLE(gx));
  masked(to, in, w, dropped);
  for (int i = 0; i < 16; ++i) sum[i] += to[i];
  store(gx + at, sum, some, WHOLE(gx));
}
"""

SOURCE = COMMON + ROWS
NAMES = (
    "take_rows", "put_rows", "add_rms", "rms_back", "cross_entropy", "norm", "norm_back", "turn",
    "swiglu", "swiglu_back", "gelu", "gelu_tanh", "keep_rows", "keep_back",
)  # fmt: skip
