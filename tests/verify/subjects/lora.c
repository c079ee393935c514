/* LoRA on a linear map in plain C, as a shared library: y = x W' + b + s (x o mask) A' B', and its adjoint.
 * Row-major; mask, b and gb may be NULL. FLAW plants one fault, for tests of what catches it. */
#include <stdint.h>
#ifndef REAL
#define REAL float
#endif
#ifndef FLAW
#define FLAW 0
#endif
typedef REAL real;
typedef int64_t size;

static real kept(const real *x, const real *mask, size i) { return mask ? x[i] * mask[i] : x[i]; }

void lora_fwd(size N, size d_in, size d_out, size r, real s, const real *x, const real *mask, const real *W,
              const real *A, const real *B, const real *b, real *y, real *z)
{
    for (size n = 0; n < N; n++) {
        for (size q = 0; q < r; q++) {
            real sum = 0;
            for (size j = 0; j < d_in; j++) sum += kept(x, mask, n * d_in + j) * A[q * d_in + j];
            z[n * r + q] = sum;
        }
        for (size i = 0; i < d_out; i++) {
            real base = 0, update = 0;
            for (size j = 0; j < d_in; j++) base += x[n * d_in + j] * W[i * d_in + j];
            for (size q = 0; q < r; q++) update += z[n * r + q] * B[i * r + q];
            y[n * d_out + i] = base + (b ? b[i] : 0) + s * update;
        }
    }
    if (FLAW == 1) y[N * d_out] = 1;                     /* writes past the end of y */
    if (FLAW == 2) y[0] += 0 * x[N * d_in];              /* reads past the end of x */
    if (FLAW == 3) ((real *)W)[1] *= 2;                  /* writes into an input */
    if (FLAW == 4) z[-1] = 1;                            /* writes before z */
    if (FLAW == 5 && N > 0) y[0] += 0 * W[-1];           /* reads before W */
}

void lora_bwd(size N, size d_in, size d_out, size r, real s, const real *x, const real *mask, const real *W,
              const real *A, const real *B, const real *z, const real *gy, real *gx, real *gA, real *gB, real *gb)
{
    for (size i = 0; i < r * d_in; i++) gA[i] = 0;
    for (size i = 0; i < d_out * r; i++) gB[i] = 0;
    for (size i = 0; gb && i < d_out; i++) gb[i] = 0;
    for (size n = 0; n < N; n++) {
        const real *g = gy + n * d_out;
        real *out = gx + n * d_in;
        for (size j = 0; j < d_in; j++) {
            out[j] = 0;
            for (size i = 0; i < d_out; i++) out[j] += g[i] * W[i * d_in + j];
        }
        for (size q = 0; q < r; q++) {
            real gz = 0;
            for (size i = 0; i < d_out; i++) {
                gz += s * g[i] * B[i * r + q];
                gB[i * r + q] += s * g[i] * z[n * r + q];
            }
            for (size j = 0; j < d_in; j++) {
                gA[q * d_in + j] += gz * kept(x, mask, n * d_in + j);
                out[j] += gz * A[q * d_in + j] * (mask ? mask[n * d_in + j] : 1);
            }
        }
        for (size i = 0; gb && i < d_out; i++) gb[i] += g[i];
    }
    if (FLAW == 6) gA[r * d_in - 1] = gA[r * d_in - 1] / 0 * 0;  /* NaN */
    if (FLAW == 7) ((real *)gy)[0] = 1;                  /* writes into an input of the backward function */
}
