/* RMSNorm, the gate before it and rounding to 8 bits, in one pass over each row and back.

   NUMBER is the type of activations: float, or uint16_t for bfloat16. Partial sums of a weight's
   gradient are taken over PART rows each, so that they do not depend on the number of threads. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef NUMBER
#define NUMBER float
#endif
#define PART 64 /* rows */
#define NEAR 128 /* numbers, while those AHEAD come into the cache */
#define AHEAD 1024
#define LINE (64 / (int)sizeof(NUMBER))
enum { PLAIN, ROUNDED, INTEGERS }; /* what norms give */

static inline float from_float(const float *p) { return *p; }
static inline void to_float(float *p, float x) { *p = x; }

static inline float from_uint16_t(const uint16_t *p) {
    const uint32_t bits = (uint32_t)*p << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline void to_uint16_t(uint16_t *p, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    *p = (bits + 0x7fff + (bits >> 16 & 1)) >> 16; /* to nearest, ties to even */
}

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define LOAD JOIN(from_, NUMBER)
#define STORE JOIN(to_, NUMBER)

/* e^x to 2e-7 of itself, without branches: Cody and Waite's reduction and a polynomial. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float n = rintf(x * 1.44269504f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

/* x <- e^(scale * x - top), whose sum is returned. */
static float exponentials(float *x, float scale, float top, int n) {
    float sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += x[i] = exponential(scale * x[i] - top);
    return sum;
}

/* The largest of n numbers, all of which are copied to x. */
static float copy(const NUMBER *from, float *x, int n) {
    float top = -INFINITY;
    #pragma omp simd reduction(max : top)
    for (int i = 0; i < n; i++) {
        x[i] = LOAD(from + i);
        top = x[i] > top ? x[i] : top;
    }
    return top;
}

/* One row: y = x / sqrt(mean(x^2) + eps) * weight; in 8 bits, of which one is worth `step`, unless
   PLAIN. Returns the factor. */
static float norm_row(const float *x, const float *weight, float eps, int form, int n, float *y,
                      float *step) {
    float sum = 0, top = 0;
    #pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += x[i] * x[i];
    const float factor = 1 / sqrtf(sum / n + eps);
    #pragma omp simd reduction(max : top)
    for (int i = 0; i < n; i++) {
        y[i] = x[i] * factor * weight[i];
        const float size = fabsf(y[i]);
        top = size > top ? size : top;
    }
    if (form == PLAIN) return factor;
    const float scale = 127.0f / (top > 1e-5f ? top : 1e-5f);
    *step = 1 / scale;
    #pragma omp simd
    for (int i = 0; i < n; i++) y[i] = rintf(y[i] * scale);
    return factor;
}

/* One row of the gradient, of which g is that of y, and `sums`, n, collects the weight's. */
static void norm_row_back(const float *g, const float *x, const float *weight, float factor, int n,
                          float *dx, float *sums) {
    float dot = 0;
    #pragma omp simd reduction(+ : dot)
    for (int i = 0; i < n; i++) dot += g[i] * weight[i] * x[i];
    const float mean = dot * factor * factor / n;
    #pragma omp simd
    for (int i = 0; i < n; i++) {
        sums[i] += g[i] * x[i] * factor;
        dx[i] = factor * (g[i] * weight[i] - x[i] * mean);
    }
}

/* A row in its form: y; or integers, of which one is worth `step`. */
static void store(const float *row, int form, float step, int n, NUMBER *y, int8_t *integers) {
    if (form == INTEGERS) {
        #pragma omp simd
        for (int i = 0; i < n; i++) integers[i] = row[i];
    } else {
        #pragma omp simd
        for (int i = 0; i < n; i++) STORE(y + i, row[i] * step);
    }
}

/* x: float (rows, n); y: NUMBER, or integers with a step for each row; factors: (rows). */
void norm(const float *x, const float *weight, float eps, int form, int rows, int n, NUMBER *y,
          int8_t *integers, float *steps, float *factors, int threads) {
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int part = 0; part < (rows + PART - 1) / PART; part++) {
        float out[n];
        for (int64_t r = part * PART; r < rows && r < (part + 1) * PART; r++) {
            float step = 1;
            factors[r] = norm_row(x + r * n, weight, eps, form, n, out, &step);
            store(out, form, step, n, y + r * n, integers + r * n);
            if (form == INTEGERS) steps[r] = step;
        }
    }
}

/* dy: NUMBER (rows, n); dx: float; sums: zeros (parts, n), whose sum is the weight's gradient. */
void norm_back(const NUMBER *dy, const float *x, const float *weight, const float *factors,
               int rows, int n, float *dx, float *sums, int threads) {
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int part = 0; part < (rows + PART - 1) / PART; part++) {
        float g[n];
        for (int64_t r = part * PART; r < rows && r < (part + 1) * PART; r++) {
            #pragma omp simd
            for (int i = 0; i < n; i++) g[i] = LOAD(dy + r * n + i);
            norm_row_back(g, x + r * n, weight, factors[r], n, dx + r * n, sums + (int64_t)part * n);
        }
    }
}

/* The norm of silu(gate) * up, each NUMBER (rows, n). */
void gated(const NUMBER *gate, const NUMBER *up, const float *weight, float eps, int form,
           int rows, int n, NUMBER *y, int8_t *integers, float *steps, float *factors,
           int threads) {
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int part = 0; part < (rows + PART - 1) / PART; part++) {
        float x[n], out[n];
        for (int64_t r = part * PART; r < rows && r < (part + 1) * PART; r++) {
            #pragma omp simd
            for (int i = 0; i < n; i++) {
                const float a = LOAD(gate + r * n + i);
                x[i] = a / (1 + exponential(-a)) * LOAD(up + r * n + i);
            }
            float step = 1;
            factors[r] = norm_row(x, weight, eps, form, n, out, &step);
            store(out, form, step, n, y + r * n, integers + r * n);
            if (form == INTEGERS) steps[r] = step;
        }
    }
}

void gated_back(const NUMBER *dy, const NUMBER *gate, const NUMBER *up, const float *weight,
                const float *factors, int rows, int n, NUMBER *d_gate, NUMBER *d_up, float *sums,
                int threads) {
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int part = 0; part < (rows + PART - 1) / PART; part++) {
        float g[n], x[n], share[n], silu[n], dx[n];
        for (int64_t r = part * PART; r < rows && r < (part + 1) * PART; r++) {
            #pragma omp simd
            for (int i = 0; i < n; i++) {
                const float a = LOAD(gate + r * n + i), b = LOAD(up + r * n + i);
                share[i] = 1 / (1 + exponential(-a));
                silu[i] = a * share[i];
                x[i] = silu[i] * b;
                g[i] = LOAD(dy + r * n + i);
            }
            norm_row_back(g, x, weight, factors[r], n, dx, sums + (int64_t)part * n);
            #pragma omp simd
            for (int i = 0; i < n; i++) {
                const float b = LOAD(up + r * n + i);
                STORE(d_up + r * n + i, dx[i] * silu[i]);
                STORE(d_gate + r * n + i, dx[i] * b * (share[i] + silu[i] * (1 - share[i])));
            }
        }
    }
}

/* p: softmax of scale * scores, (rows, n); row r is that of query first + r % queries, which sees
   the keys up to itself. */
void causal_softmax(const NUMBER *scores, float scale, int first, int queries, int rows, int n,
                    NUMBER *p, int threads) {
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int r = 0; r < rows; r++) {
        float x[n];
        const int64_t at = (int64_t)r * n;
        const int seen = first + r % queries + 1;
        const float top = scale * copy(scores + at, x, seen);
        const float share = 1 / exponentials(x, scale, top, seen);
        #pragma omp simd
        for (int i = 0; i < seen; i++) STORE(p + at + i, x[i] * share);
        memset(p + at + seen, 0, (n - seen) * sizeof(NUMBER));
    }
}

/* d: the gradient of the scores, from that of p. */
void causal_softmax_back(const NUMBER *dp, const NUMBER *p, float scale, int first, int queries,
                         int rows, int n, NUMBER *d, int threads) {
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int r = 0; r < rows; r++) {
        const int64_t at = (int64_t)r * n;
        const int seen = first + r % queries + 1;
        float dot = 0;
        #pragma omp simd reduction(+ : dot)
        for (int i = 0; i < seen; i++) dot += LOAD(dp + at + i) * LOAD(p + at + i);
        #pragma omp simd
        for (int i = 0; i < seen; i++)
            STORE(d + at + i, scale * LOAD(p + at + i) * (LOAD(dp + at + i) - dot));
        memset(d + at + seen, 0, (n - seen) * sizeof(NUMBER));
    }
}

/* totals: the log of the sum of exp of each row of logits, (rows, n). */
void log_total(const NUMBER *logits, int rows, int n, float *totals, int threads) {
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int r = 0; r < rows; r++) {
        float x[n];
        const float top = copy(logits + (int64_t)r * n, x, n);
        totals[r] = top + logf(exponentials(x, 1, top, n));
    }
}

/* In place: e^(logits - total), less 1 in the column `target`, where there is one. */
void logits_gradient(NUMBER *logits, const float *totals, const int64_t *targets, int rows, int n,
                     int threads) {
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int r = 0; r < rows; r++) {
        NUMBER *row = logits + (int64_t)r * n;
        const int64_t target = targets[r];
        const float there = 0 <= target && target < n ? LOAD(row + target) : 0;
        const float total = totals[r];
        for (int start = 0; start < n; start += NEAR) {
            const int end = start + NEAR < n ? start + NEAR : n;
            for (int i = start; i < start + NEAR; i += LINE) __builtin_prefetch(row + i + AHEAD, 1);
            #pragma omp simd
            for (int i = start; i < end; i++) STORE(row + i, exponential(LOAD(row + i) - total));
        }
        if (0 <= target && target < n) STORE(row + target, exponential(there - totals[r]) - 1);
    }
}
