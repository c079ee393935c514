/* Judges itself on golden vectors, .safetensors or .txt. Exit codes: 0 all right, 1 wrong, 2 nothing judged. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { char name[64]; int axes; long shape[8], size; float *v; } Tensor;
static Tensor all[8192];
static int count;
#define EACH(n, m) for (i = 0; i < n; i++) for (j = 0; j < m; j++)

static Tensor *find(const char *id, const char *name) {
    size_t n = strlen(id);
    for (Tensor *t = all; t < all + count; t++)
        if (!strncmp(t->name, id, n) && t->name[n] == '.' && !strcmp(t->name + n + 1, name)) return t;
    return NULL;
}
static void die(const char *what) { fprintf(stderr, "reader: %s\n", what), exit(2); }
static float *floats(long size) { return calloc(size + 1, sizeof(float)); }
static Tensor *room(const char *name) {
    if (count == 8192 || strlen(name) > 63) die("more than this reader holds");
    strcpy(all[count].name, name), all[count].axes = 0, all[count].size = 1;
    return &all[count++];
}
static void read_safetensors(FILE *f) { /* 8 bytes of length, JSON, little-endian floats */
    unsigned char head[8], raw[4];
    long n = fread(head, 1, 8, f) == 8 ? head[0] | head[1] << 8 | (long)head[2] << 16 : 0, begin;
    char *json = calloc(n + 1, 1), name[64], *p = json, *start;
    if (!n || fread(json, 1, n, f) != (size_t)n) die("no header");
    while ((p = strstr(p, "\":{\"dtype\":\"F32\",\"shape\":["))) {
        for (start = p; start[-1] != '"';) start--;
        snprintf(name, sizeof name, "%.*s", (int)(p - start), start);
        Tensor *t = room(name);
        for (p = strchr(p, '[') + 1; *p != ']' && t->axes < 8; p += *p == ',') t->size *= t->shape[t->axes++] = strtol(p, &p, 10);
        if (sscanf(p, "],\"data_offsets\":[%ld,", &begin) != 1) die("no offsets");
        t->v = floats(t->size);
        fseek(f, 8 + n + begin, SEEK_SET);
        for (long i = 0; i < t->size && fread(raw, 1, 4, f) == 4; i++) {
            unsigned u = raw[0] | raw[1] << 8 | raw[2] << 16 | (unsigned)raw[3] << 24; /* on any machine */
            memcpy(&t->v[i], &u, 4); }
    }
}
static void read_text(FILE *f) { /* name axes sizes exponent, then integers */
    char name[64]; int axes, exponent; long n;
    while (fscanf(f, "%63s %d", name, &axes) == 2 && axes <= 8) {
        Tensor *t = room(name);
        while (t->axes < axes && fscanf(f, "%ld", &t->shape[t->axes]) == 1) t->size *= t->shape[t->axes++];
        t->v = floats(t->size);
        if (fscanf(f, "%d", &exponent) != 1) die("no exponent");
        for (long i = 0; i < t->size && fscanf(f, "%ld", &n) == 1; i++) t->v[i] = ldexpf((float)n, exponent);
    }
}
static long judge(const char *id, const char *name, const float *got) { /* how many differ, by 8 sigma or at all */
    char full[64];
    snprintf(full, sizeof full, "sigma.fp32.%s", name);
    Tensor *want = find(id, name), *sigma = find(id, full); long wrong = 0;
    for (long i = 0; i < want->size; i++)
        wrong += !(fabs((double)got[i] - want->v[i]) <= (sigma ? 8.0 * sigma->v[i] : 0));
    if (wrong) printf("%s.%s: %ld of %ld differ\n", id, name, wrong, want->size);
    return wrong;
}
static float dot(const float *a, long da, const float *b, long db, long n) { /* of two strided vectors */
    float sum = 0;
    while (n--) sum += a[n * da] * b[n * db];
    return sum;
}
static long layer(const char *id) { /* y, gx, gA, gB of one layer, and how many of their entries are wrong */
    Tensor *X = find(id, "x"), *M = find(id, "mask"), *b = find(id, "b"), *bB = find(id, "bB"), *tW = find(id, "W");
    Tensor *tA = find(id, "A");
    float *W = tW->v, *A = tA->v, *B = find(id, "B")->v, *gy = find(id, "gy")->v, s = find(id, "s")->v[0];
    long o = tW->shape[0], d = tW->shape[1], r = tA->shape[0], N = d ? X->size / d : 0, i, j;
    float *xd = floats(N * d), *z = floats(N * r), *gz = floats(N * r), *gu = floats(N * o);
    float *y = floats(N * o), *gx = floats(N * d), *gA = floats(r * d), *gB = floats(o * r);
    EACH(N, d) xd[i * d + j] = X->v[i * d + j] * (M ? M->v[i * d + j] : 1);
    EACH(N, o) gu[i * o + j] = s * gy[i * o + j];
    EACH(N, r) z[i * r + j] = dot(xd + i * d, 1, A + j * d, 1, d);
    EACH(N, r) gz[i * r + j] = dot(gu + i * o, 1, B + j, r, o);
    EACH(N, o) y[i * o + j] = s * (dot(z + i * r, 1, B + j * r, 1, r) + (bB ? bB->v[j] : 0));
    EACH(N, o) y[i * o + j] += dot(X->v + i * d, 1, W + j * d, 1, d) + (b ? b->v[j] : 0);
    EACH(N, d) gx[i * d + j] = dot(gz + i * r, 1, A + j, d, r) * (M ? M->v[i * d + j] : 1);
    EACH(N, d) gx[i * d + j] += dot(gy + i * o, 1, W + j, d, o);
    EACH(r, d) gA[i * d + j] = dot(gz + i, r, xd + j, d, N);
    EACH(o, r) gB[i * r + j] = dot(gu + i, o, z + j, r, N);
    return judge(id, "y", y) + judge(id, "gx", gx) + judge(id, "gA", gA) + judge(id, "gB", gB);
}
int main(int argc, char **argv) {
    FILE *f = argc == 2 ? fopen(argv[1], "rb") : NULL;
    if (!f) die("expected one file that can be read");
    strstr(argv[1], ".txt") ? read_text(f) : read_safetensors(f);
    long tests = 0, wrong = 0;
    for (int i = 0; i < count; i++) {
        char id[64], *end = strchr(strcpy(id, all[i].name), '.');
        if (!end || strcmp(end, ".gx")) continue; /* a layer that must be refused has no gx */
        *end = 0;
        if (!find(id, "m")) tests++, wrong += layer(id); /* with m it is DoRA */
    }
    printf("%ld layers judged, %ld entries wrong\n", tests, wrong);
    return wrong ? 1 : tests ? 0 : 2;
}
