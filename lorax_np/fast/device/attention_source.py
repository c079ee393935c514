"""CUDA source of attention within sequences, by tiles: no T × T matrix is ever there.

A block of 128 threads, 8 × 16, has a tile of rows of one sequence and head, and goes over the tiles that it
sees, or that see it; tiles lie in shared memory, what is added up in registers. Nothing is added atomically:
the gradients of a key head are added up over its queries' heads in their order. specs/training_speed.md.
"""

from ..gpu_kernels import SOURCE as COMMON

THREADS = 128  # of a block
CHUNKS = 1, 2, 4, 8, 16  # columns of a head by sixteens; one kernel each

ATTENTION = r"""
// rows of a tile: as many as fit four times into shared memory, beside their products
template <class T, int C> struct Tile {
  static constexpr int B = 128 / (int)sizeof(T) / (C < 4 ? 1 : C / 4);
  static constexpr int P = 16 * C + 1;       // a row's step: odd, so that a column's entries lie in all banks
  static constexpr int I = B / 8;            // rows of a thread: ty, ty + 8, ...
  static constexpr int J = (B + 15) / 16;    // and columns of scores: tx, tx + 16, ...
};

#define TILE \
  constexpr int B = Tile<T, C>::B, P = Tile<T, C>::P, I = Tile<T, C>::I, J = Tile<T, C>::J; \
  int tx = threadIdx.x % 16, ty = threadIdx.x / 16;

// rows of a buffer into a tile, times a factor; zeros after the sequence's end and the head's columns
template <class T, int B, int P>
__device__ inline void bring(T* tile, const T* from, u32 first, u32 end, u32 width, u32 D, T by) {
  for (u32 e = threadIdx.x; e < B * (P - 1); e += blockDim.x) {
    u32 i = e / (P - 1), c = e % (P - 1);
    tile[i * P + c] = first + i < end && c < D ? by * from[(u64)(first + i) * width + c] : (T)0;
  }
}

// S[r][c] = <a[ty + 8r], b[tx + 16c]>
template <class T, int B, int P, int I, int J>
__device__ inline void scores(T S[I][J], const T* a, const T* b, int tx, int ty) {
  for (int r = 0; r < I; ++r) for (int c = 0; c < J; ++c) S[r][c] = 0;
  for (int d = 0; d < P - 1; ++d) {
    T left[I], right[J];
    for (int r = 0; r < I; ++r) left[r] = a[(ty + 8 * r) * P + d];
    for (int c = 0; c < J; ++c) right[c] = tx + 16 * c < B ? b[(tx + 16 * c) * P + d] : (T)0;
    for (int r = 0; r < I; ++r) for (int c = 0; c < J; ++c) S[r][c] += left[r] * right[c];
  }
}

// sum[r][c] += Σ_j s[ty + 8r][j] x[j][tx + 16c], or with s read across
template <class T, int B, int P, int I, int C, bool across>
__device__ inline void add_up(T sum[I][C], const T* s, const T* x, int tx, int ty) {
  for (int j = 0; j < B; ++j) {
    T left[I], right[C];
    for (int r = 0; r < I; ++r) left[r] = across ? s[j * (B + 1) + ty + 8 * r] : s[(ty + 8 * r) * (B + 1) + j];
    for (int c = 0; c < C; ++c) right[c] = x[j * P + tx + 16 * c];
    for (int r = 0; r < I; ++r) for (int c = 0; c < C; ++c) sum[r][c] += left[r] * right[c];
  }
}

__device__ inline bool sees(u32 t, u32 s, u32 window, u32 both) { return s <= t ? t - s < window : both; }

// q, k, v: heads beside one another, from at_k and at_v on in rows of wide_q and wide_k; they may be one array.
// window, and `both`, whether keys after a query are seen
#define HEADS const T* q_, const T* k_, const T* v_, u32 at_k, u32 at_v, u32 wide_q, u32 wide_k
#define PLACES const u32* starts, u32 tiles, u32 H, u32 K, u32 D, u32 window, u32 both, T scale
#define MY_PLACE \
  u32 tile = blockIdx.x % tiles, head = blockIdx.x / tiles % H, sequence = blockIdx.x / tiles / H; \
  u32 begin = starts[sequence], end = starts[sequence + 1], first = begin + tile * B; \
  if (first >= end) return; \
  u32 shared = head / (H / K) * D; \
  const T *queries = q_ + head * D, *keys = k_ + at_k + shared, *values = v_ + at_v + shared;
// the keys that a tile's queries see: from the beginning of a tile on, to where they stop
#define STOP (both || first + B > end ? end : first + B)
#define SEEN_FROM(t) ((t) - begin < window ? begin : begin + ((t) - begin - window + 1) / B * B)

// o = softmax(scale·q kᵀ)v and L = logsumexp of the scores; o : (N, H·D), L : (N, H)
template <class T, int C>
__global__ void attend(T* o, T* L, HEADS, PLACES) {
  TILE
  MY_PLACE
  __shared__ T q[B * P], kv[B * P], s[B * (B + 1)], part[B * (128 / B)], top[B], total[B], by[B];
  constexpr int G = 128 / B;                   // threads that share a row of scores
  int row = threadIdx.x / G, lane = threadIdx.x % G;
  T sum[I][C];
  for (int r = 0; r < I; ++r) for (int c = 0; c < C; ++c) sum[r][c] = 0;
  const T none = -(T)__uint_as_float(0x7f800000u);
  if (threadIdx.x < B) { top[threadIdx.x] = none; total[threadIdx.x] = 0; }
  bring<T, B, P>(q, queries, first, end, wide_q, D, scale);
  for (u32 from = SEEN_FROM(first); from < STOP; from += B) {
    __syncthreads();
    bring<T, B, P>(kv, keys, from, end, wide_k, D, (T)1);
    __syncthreads();
    T S[I][J];
    scores<T, B, P, I, J>(S, q, kv, tx, ty);
    for (int r = 0; r < I; ++r)
      for (int c = 0; c < J; ++c)
        if (tx + 16 * c < B) {
          u32 t = first + ty + 8 * r, at = from + tx + 16 * c;
          s[(ty + 8 * r) * (B + 1) + tx + 16 * c] = sees(t, at, window, both) && at < end ? S[r][c] : none;
        }
    __syncthreads();
    bring<T, B, P>(kv, values, from, end, wide_k, D, (T)1);
    T high = none;
    for (int j = lane; j < B; j += G) if (s[row * (B + 1) + j] > high) high = s[row * (B + 1) + j];
    part[row * G + lane] = high;
    __syncthreads();
    high = top[row];
    for (int j = 0; j < G; ++j) if (part[row * G + j] > high) high = part[row * G + j];
    __syncthreads();
    T some = 0;
    for (int j = lane; j < B; j += G) {
      T p = s[row * (B + 1) + j] == none ? (T)0 : exp(s[row * (B + 1) + j] - high);
      s[row * (B + 1) + j] = p;
      some += p;
    }
    part[row * G + lane] = some;
    __syncthreads();
    if (lane == 0) {
      T was = top[row] == none ? (T)0 : exp(top[row] - high), all = total[row] * was;
      for (int j = 0; j < G; ++j) all += part[row * G + j];
      by[row] = was;
      top[row] = high;
      total[row] = all;
    }
    __syncthreads();
    for (int r = 0; r < I; ++r) for (int c = 0; c < C; ++c) sum[r][c] *= by[ty + 8 * r];
    add_up<T, B, P, I, C, false>(sum, s, kv, tx, ty);
  }
  for (int r = 0; r < I; ++r) {
    u32 t = first + ty + 8 * r;
    if (t >= end) continue;
    for (int c = 0; c < C; ++c)
      if (tx + 16 * c < D) o[(u64)t * H * D + head * D + tx + 16 * c] = sum[r][c] / total[ty + 8 * r];
    if (tx == 0) L[(u64)t * H + head] = top[ty + 8 * r] + log(total[ty + 8 * r]);
  }
}

// gP of a pair of tiles and P from L -> P, and gS = P∘(gP − delta), in the threads' registers
#define SLOPES(left, right, over, under) \
  scores<T, B, P, I, J>(S, left, right, tx, ty); \
  scores<T, B, P, I, J>(R, over, under, tx, ty); \
  for (int r = 0; r < I; ++r) \
    for (int c = 0; c < J; ++c) { \
      u32 t = query + ty + 8 * r, at = key + tx + 16 * c; \
      bool seen = tx + 16 * c < B && t < end && at < end && sees(t, at, window, both); \
      S[r][c] = seen ? exp(S[r][c] - high[ty + 8 * r]) : (T)0; \
      R[r][c] = S[r][c] * (R[r][c] - delta[ty + 8 * r]); \
    }

// gq, and delta = <go∘o> of each head, which the other kernel reads: (N, H)
template <class T, int C>
__global__ void attend_back_q(T* g, T* deltas, const T* go, const T* o, const T* L, HEADS, PLACES) {
  TILE
  MY_PLACE
  __shared__ T q[B * P], out[B * P], k[B * P], v[B * P], s[B * (B + 1)], high[B], delta[B];
  T S[I][J], R[I][J], sum[I][C];
  for (int r = 0; r < I; ++r) for (int c = 0; c < C; ++c) sum[r][c] = 0;
  bring<T, B, P>(q, queries, first, end, wide_q, D, scale);
  bring<T, B, P>(out, go + head * D, first, end, H * D, D, (T)1);
  bring<T, B, P>(k, o + head * D, first, end, H * D, D, (T)1);
  __syncthreads();
  if (threadIdx.x < B) {
    u32 t = first + threadIdx.x;
    T dot = 0;
    for (int c = 0; c < P - 1; ++c) dot += out[threadIdx.x * P + c] * k[threadIdx.x * P + c];
    delta[threadIdx.x] = dot;
    high[threadIdx.x] = t < end ? L[(u64)t * H + head] : (T)0;
    if (t < end) deltas[(u64)t * H + head] = dot;
  }
  u32 query = first;
  for (u32 key = SEEN_FROM(first); key < STOP; key += B) {
    __syncthreads();
    bring<T, B, P>(k, keys, key, end, wide_k, D, (T)1);
    bring<T, B, P>(v, values, key, end, wide_k, D, (T)1);
    __syncthreads();
    SLOPES(q, k, out, v)
    for (int r = 0; r < I; ++r)
      for (int c = 0; c < J; ++c) if (tx + 16 * c < B) s[(ty + 8 * r) * (B + 1) + tx + 16 * c] = R[r][c];
    __syncthreads();
    add_up<T, B, P, I, C, false>(sum, s, k, tx, ty);
  }
  for (int r = 0; r < I; ++r)
    for (int c = 0; c < C; ++c)
      if (first + ty + 8 * r < end && tx + 16 * c < D)
        g[(u64)(first + ty + 8 * r) * wide_q + head * D + tx + 16 * c] = scale * sum[r][c];
}

// gk and gv of a key head by one of its queries' heads: (N, H, 2·D)
template <class T, int C>
__global__ void attend_back_kv(T* g, const T* deltas, const T* go, const T* L, HEADS, PLACES) {
  TILE
  MY_PLACE
  __shared__ T q[B * P], out[B * P], k[B * P], v[B * P], s[B * (B + 1)], p[B * (B + 1)], high[B], delta[B];
  T S[I][J], R[I][J], of_k[I][C], of_v[I][C];
  for (int r = 0; r < I; ++r) for (int c = 0; c < C; ++c) of_k[r][c] = of_v[r][c] = 0;
  bring<T, B, P>(k, keys, first, end, wide_k, D, (T)1);
  bring<T, B, P>(v, values, first, end, wide_k, D, (T)1);
  u32 key = first, last = end - first < window ? end : first + B - 1 + window;  // whose rows see this tile
  if (last > end || last < first) last = end;
  for (u32 query = both ? begin : first; query < last; query += B) {
    __syncthreads();
    bring<T, B, P>(q, queries, query, end, wide_q, D, scale);
    bring<T, B, P>(out, go + head * D, query, end, H * D, D, (T)1);
    if (threadIdx.x < B) {
      u32 t = query + threadIdx.x;
      high[threadIdx.x] = t < end ? L[(u64)t * H + head] : (T)0;
      delta[threadIdx.x] = t < end ? deltas[(u64)t * H + head] : (T)0;
    }
    __syncthreads();
    SLOPES(q, k, out, v)
    for (int r = 0; r < I; ++r)
      for (int c = 0; c < J; ++c)
        if (tx + 16 * c < B) {
          s[(ty + 8 * r) * (B + 1) + tx + 16 * c] = R[r][c];
          p[(ty + 8 * r) * (B + 1) + tx + 16 * c] = S[r][c];
        }
    __syncthreads();
    add_up<T, B, P, I, C, true>(of_k, s, q, tx, ty);
    add_up<T, B, P, I, C, true>(of_v, p, out, tx, ty);
  }
  for (int r = 0; r < I; ++r)
    for (int c = 0; c < C; ++c)
      if (first + ty + 8 * r < end && tx + 16 * c < D) {
        T* to = g + ((u64)(first + ty + 8 * r) * H + head) * 2 * D + tx + 16 * c;
        to[0] = of_k[r][c];
        to[D] = of_v[r][c];
      }
}

// those of a key head added up over its queries' heads
template <class T, int C>
__global__ void gather_kv(
    T* gk, T* gv, const T* parts, u32 at_k, u32 at_v, u32 wide_k, u32 H, u32 K, u32 D, u64 count) {
  u64 at = blockIdx.x * (u64)blockDim.x + threadIdx.x;
  if (at >= count) return;
  u32 c = (u32)(at % D), both = (u32)(at / D % 2), head = (u32)(at / D / 2 % K), group = H / K;
  u64 t = at / D / 2 / K;
  T sum = 0;
  for (u32 i = 0; i < group; ++i) sum += parts[((t * H + head * group + i) * 2 + both) * D + c];
  (both ? gv + at_v : gk + at_k)[t * wide_k + head * D + c] = sum;
}
"""

SOURCE = COMMON + ATTENTION
NAMES = "attend", "attend_back_q", "attend_back_kv", "gather_kv"


def chunks_of(D: int, itemsize: int) -> int | None:
    """Sixteens of columns of the kernel for heads of D; None where no tile of them fits.

    >>> chunks_of(64, 4), chunks_of(80, 4), chunks_of(256, 8)
    (4, 8, None)
    """
    found = next((C for C in CHUNKS if D <= 16 * C), None)
    return None if found is None or height_of(found, itemsize) < 8 else found


def height_of(C: int, itemsize: int) -> int:
    """Rows of a tile, as the source has it."""
    return 128 // itemsize // max(1, C // 4)
