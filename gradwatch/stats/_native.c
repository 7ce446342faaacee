/* One-pass statistics of float tensors on the CPU; compiled at first use by _native.py, which says what each returns.

   Sums are in double, in lanes that the compiler turns into vectors. Types: 0 float, 1 bfloat16, 2 double. */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LANES 16

static inline float widen_float(const float *x) { return *x; }
static inline float widen_half(const uint16_t *x) {
    uint32_t bits = (uint32_t)*x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
static inline double widen_double(const double *x) { return *x; }

/* One core reads memory a third faster from four places at once than from one: each has prefetching of its own. */
#define STREAMS 4
#define SQUARES(KIND, TYPE)                                                            \
    static double squares_##KIND(const TYPE *x, size_t n) {                            \
        double lanes[STREAMS][LANES] = {{0}}, total = 0;                               \
        size_t part = n / (STREAMS * LANES) * LANES, i = STREAMS * part;               \
        for (size_t at = 0; at < part; at += LANES)                                    \
            for (int s = 0; s < STREAMS; s++)                                          \
                for (int j = 0; j < LANES; j++) {                                      \
                    double value = widen_##KIND(x + s * part + at + j);                \
                    lanes[s][j] += value * value;                                      \
                }                                                                      \
        for (; i < n; i++) {                                                           \
            double value = widen_##KIND(x + i);                                        \
            total += value * value;                                                    \
        }                                                                              \
        for (int s = 0; s < STREAMS; s++)                                              \
            for (int j = 0; j < LANES; j++) total += lanes[s][j];                      \
        return total;                                                                  \
    }
SQUARES(float, float)
SQUARES(half, uint16_t)
SQUARES(double, double)

static inline uint32_t code_float(const float *x) {
    uint32_t bits;
    memcpy(&bits, x, sizeof bits);
    return bits >> 23;
}
static inline uint32_t code_half(const uint16_t *x) { return *x >> 7; }
static inline uint32_t code_double(const double *x) {
    float value = (float)*x;
    return code_float(&value);
}

/* Four tables in turn: neighbours mostly fall into one bin, and would wait for each other's store. */
#define COUNT(KIND, TYPE)                                                              \
    static void count_##KIND(const TYPE *x, size_t n, uint32_t tables[4][512]) {       \
        size_t i = 0;                                                                  \
        for (; i + 4 <= n; i += 4) {                                                   \
            uint32_t a = code_##KIND(x + i), b = code_##KIND(x + i + 1);               \
            uint32_t c = code_##KIND(x + i + 2), d = code_##KIND(x + i + 3);           \
            tables[0][a]++, tables[1][b]++, tables[2][c]++, tables[3][d]++;            \
        }                                                                              \
        for (; i < n; i++) tables[0][code_##KIND(x + i)]++;                            \
    }
COUNT(float, float)
COUNT(half, uint16_t)
COUNT(double, double)

static void add_tables(uint32_t tables[4][512], int64_t *out) {
    for (int k = 0; k < 512; k++)
        out[k] += (int64_t)tables[0][k] + tables[1][k] + tables[2][k] + tables[3][k];
}

/* BITS, EXPONENT, SIGNLESS: the integer of WIDE's size, the mask of its exponent, all but its sign. A nan's bits are
   above the exponent mask; magnitudes order as their bits do. A block stays in the first cache for both loops over it. */
#define LOOK(KIND, at, j, BITS, EXPONENT)                                              \
    {                                                                                  \
        double value = widen_##KIND(at);                                               \
        sums[j] += value, squares[j] += value * value;                                 \
        BITS magnitude = magnitude_##KIND(at);                                         \
        BITS number = magnitude > EXPONENT ? 0 : magnitude;                            \
        zero[j] += magnitude == 0;                                                     \
        bad[j] += magnitude >= EXPONENT;                                               \
        most[j] = number > most[j] ? number : most[j];                                 \
    }
#define MOMENTS(KIND, TYPE, WIDE, BITS, EXPONENT, SIGNLESS)                            \
    static inline BITS magnitude_##KIND(const TYPE *x) {                               \
        WIDE value = widen_##KIND(x);                                                  \
        BITS bits;                                                                     \
        memcpy(&bits, &value, sizeof bits);                                            \
        return bits & SIGNLESS;                                                        \
    }                                                                                  \
    static void moments_##KIND(const TYPE *x, size_t n, double *out, int64_t *counts) { \
        uint32_t tables[4][512];                                                       \
        if (counts) memset(tables, 0, sizeof tables);                                  \
        double sum = 0, square = 0;                                                    \
        int64_t zeros = 0, nonfinite = 0;                                              \
        BITS largest = 0;                                                              \
        for (size_t start = 0; start < n; start += 4096) {                             \
            size_t size = n - start < 4096 ? n - start : 4096, i = 0;                  \
            const TYPE *block = x + start;                                             \
            double sums[LANES] = {0}, squares[LANES] = {0};                            \
            BITS zero[LANES] = {0}, bad[LANES] = {0}, most[LANES] = {0};               \
            for (; i + LANES <= size; i += LANES)                                      \
                for (int j = 0; j < LANES; j++) LOOK(KIND, block + i + j, j, BITS, EXPONENT) \
            for (; i < size; i++) LOOK(KIND, block + i, 0, BITS, EXPONENT)             \
            for (int j = 0; j < LANES; j++) {                                          \
                sum += sums[j], square += squares[j];                                  \
                zeros += zero[j], nonfinite += bad[j];                                 \
                largest = most[j] > largest ? most[j] : largest;                       \
            }                                                                          \
            if (counts) count_##KIND(block, size, tables);                             \
        }                                                                              \
        if (counts) add_tables(tables, counts);                                        \
        WIDE absmax;                                                                   \
        memcpy(&absmax, &largest, sizeof absmax);                                      \
        out[0] = sum, out[1] = square, out[2] = (double)zeros;                         \
        out[3] = (double)nonfinite, out[4] = (double)absmax;                           \
    }
MOMENTS(float, float, float, int32_t, 0x7f800000, 0x7fffffff)
MOMENTS(half, uint16_t, float, int32_t, 0x7f800000, 0x7fffffff)
MOMENTS(double, double, double, int64_t, 0x7ff0000000000000, 0x7fffffffffffffff)

/* Squares of (old - new) and of old, from one read of both. */
#define MOVED(KIND, TYPE)                                                              \
    static void moved_##KIND(const TYPE *old, const TYPE *now, size_t n, double *out) { \
        double by[STREAMS][LANES] = {{0}}, held[STREAMS][LANES] = {{0}};                \
        size_t part = n / (STREAMS * LANES) * LANES, i = STREAMS * part;               \
        out[0] = out[1] = 0;                                                           \
        for (size_t at = 0; at < part; at += LANES)                                    \
            for (int s = 0; s < STREAMS; s++)                                          \
                for (int j = 0; j < LANES; j++) {                                      \
                    double a = widen_##KIND(old + s * part + at + j);                  \
                    double d = a - widen_##KIND(now + s * part + at + j);              \
                    by[s][j] += d * d, held[s][j] += a * a;                            \
                }                                                                      \
        for (; i < n; i++) {                                                           \
            double a = widen_##KIND(old + i), d = a - widen_##KIND(now + i);           \
            out[0] += d * d, out[1] += a * a;                                          \
        }                                                                              \
        for (int s = 0; s < STREAMS; s++)                                              \
            for (int j = 0; j < LANES; j++) out[0] += by[s][j], out[1] += held[s][j];  \
    }
MOVED(float, float)
MOVED(half, uint16_t)
MOVED(double, double)

void gradwatch_squares(int type, size_t count, const void **tensors, const int64_t *numels, double *out) {
    for (size_t t = 0; t < count; t++)
        out[t] = type == 0 ? squares_float(tensors[t], (size_t)numels[t])
               : type == 1 ? squares_half(tensors[t], (size_t)numels[t])
                           : squares_double(tensors[t], (size_t)numels[t]);
}

void gradwatch_norms(int type, size_t count, const void **tensors, const int64_t *numels, double *out) {
    /* Behind the norms, the norm of them all. */
    double total = 0;
    gradwatch_squares(type, count, tensors, numels, out);
    for (size_t t = 0; t < count; t++) total += out[t], out[t] = sqrt(out[t]);
    out[count] = sqrt(total);
}

static void moments(int type, const void *x, size_t n, double *out, int64_t *counts) {
    if (type == 0) moments_float(x, n, out, counts);
    else if (type == 1) moments_half(x, n, out, counts);
    else moments_double(x, n, out, counts);
}

void gradwatch_moments_of(int type, const void *x, size_t n, double *out) { moments(type, x, n, out, NULL); }

void gradwatch_moments(int type, size_t count, const void **tensors, const int64_t *numels, double *out) {
    for (size_t t = 0; t < count; t++) moments(type, tensors[t], (size_t)numels[t], out + 5 * t, NULL);
}

void gradwatch_everything(int type, size_t count, const void **tensors, const int64_t *numels, double *out) {
    /* Behind the moments, `out` has room for the counts, integers as wide as a double. */
    int64_t *counts = (int64_t *)(out + 5 * count);
    for (size_t t = 0; t < count; t++) moments(type, tensors[t], (size_t)numels[t], out + 5 * t, counts + 512 * t);
}

void gradwatch_histograms(int type, size_t count, const void **tensors, const int64_t *numels, int64_t *out) {
    for (size_t t = 0; t < count; t++) {
        uint32_t tables[4][512];
        memset(tables, 0, sizeof tables);
        if (type == 0) count_float(tensors[t], (size_t)numels[t], tables);
        else if (type == 1) count_half(tensors[t], (size_t)numels[t], tables);
        else count_double(tensors[t], (size_t)numels[t], tables);
        add_tables(tables, out + 512 * t);
    }
}

void gradwatch_moved(int type, size_t count, const void **tensors, const int64_t *numels, double *out) {
    /* The second half of `tensors` holds where the first half went. */
    for (size_t t = 0; t < count; t++) {
        if (type == 0) moved_float(tensors[t], tensors[count + t], (size_t)numels[t], out + 2 * t);
        else if (type == 1) moved_half(tensors[t], tensors[count + t], (size_t)numels[t], out + 2 * t);
        else moved_double(tensors[t], tensors[count + t], (size_t)numels[t], out + 2 * t);
    }
}
