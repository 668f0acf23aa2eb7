/* Causal attention in bfloat16 in tiles, forward and back, a head at a time: after FlashAttention 2
   (Dao 2023, algorithms 1 and 2), but that a row's scores fit into the cache, so that its softmax
   needs no second look.

   On the way back the scores are computed again, from the rows' log_totals. Every sum has one
   order, whatever the threads. Tokens T and features K are multiples of 32. */

#include "tiles.h"

#ifdef HAS_TILES
#include <math.h>
#include <omp.h>

#define QUERIES 128 /* at a time on the way back */
#define LOG2_E 1.44269504f

typedef struct {
    long batch, head, token;
} Strides;

typedef struct { /* of one head: (T, K) with a stride from token to token */
    uint16_t *at;
    long stride;
} Rows;

static Rows rows_of(const uint16_t *all, Strides by, int b, int h) {
    return (Rows){(uint16_t *)all + b * by.batch + h * by.head, by.token};
}

/* 2^x to 3e-6 of itself, 0 below the range. */
static inline __m512 power(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.33335581e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.61812911e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.55041087e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.40226507e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93147181e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* For products along features: tiles of 16 tokens' pairs of features. */
static void pack_tokens(Rows x, int T, int K, __m512i *to) {
    for (int t = 0; t < T; t += 16)
        for (int f = 0; f < K; f += 32, to += LINES) {
            for (int i = 0; i < LINES; i++)
                to[i] = _mm512_loadu_si512(x.at + (t + i) * x.stride + f);
            transpose(to);
        }
}

/* For products along tokens: of each 32 features, two rows of tiles. */
static void pack_features(Rows x, int T, int K, __m512i *to) {
    for (int f = 0; f < K; f += 32) pack(x.at, f, x.stride, 0, T, 0, to + (long)f / 32 * T);
}

/* The weights, times their sum, of `seen` keys of a row of scores; 0 up to `end`. */
static float weigh(const float *scores, float scale, int seen, int end, uint16_t *to,
                   float *total) {
    __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int i = 0; i < seen; i += 16) {
        const __mmask16 there = seen - i >= 16 ? 0xffff : (1 << (seen - i)) - 1;
        top = _mm512_mask_max_ps(top, there, top, _mm512_loadu_ps(scores + i));
    }
    const float most = _mm512_reduce_max_ps(top) * scale;
    const __m512 by = _mm512_set1_ps(scale), less = _mm512_set1_ps(most);
    for (int i = 0; i < end; i += 32) {
        __m512 p[2];
        for (int j = 0; j < 2; j++) {
            const int left = seen - i - 16 * j;
            const __mmask16 there = left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0;
            const __m512 x = _mm512_loadu_ps(scores + i + 16 * j);
            p[j] = _mm512_maskz_mov_ps(there, power(_mm512_fmsub_ps(x, by, less)));
            sum = _mm512_add_ps(sum, p[j]);
        }
        store(to + i, p[0], p[1]);
    }
    const float all = _mm512_reduce_add_ps(sum);
    *total = most + log2f(all);
    return 1 / all;
}

static void forward(Rows q, Rows k, Rows v, int T, int K, float scale, Rows o, float *totals,
                    __m512i *room) {
    __m512i *const keys = room, *const values = keys + (long)T * K / 32;
    float *const scores = (float *)(values + (long)T * K / 32), part[32 * 32], share[32];
    uint16_t *const weights = (uint16_t *)(scores + 32 * T);
    pack_tokens(k, T, K, keys);
    pack_features(v, T, K, values);
    for (int t = 0; t < T; t += 32) {
        const int end = t + 32;
        const Side queries = in_rows(q.at + t * q.stride, 2 * q.stride);
        for (int key = 0; key < end; key += 32)
            multiply(queries, packed(keys + (long)key * K / 32, K / 2), K / 32, 0, 0,
                     scores + key, T);
        for (int i = 0; i < 32; i++)
            share[i] = weigh(scores + i * T, scale, t + i + 1, end, weights + i * T,
                             totals + t + i);
        for (int f = 0; f < K; f += 32) {
            multiply(in_rows(weights, 2 * T), packed(values + (long)f / 32 * T, T / 2), end / 32,
                     0, 0, part, 32);
            for (int i = 0; i < 32; i++) {
                const __m512 by = _mm512_set1_ps(share[i]);
                const __m512 a = _mm512_loadu_ps(part + 32 * i);
                const __m512 b = _mm512_loadu_ps(part + 32 * i + 16);
                store(o.at + (t + i) * o.stride + f, _mm512_mul_ps(a, by), _mm512_mul_ps(b, by));
            }
        }
    }
}

/* dots: of each token's gradient and output. */
static void dot_rows(Rows a, Rows b, int T, int K, float *dots) {
    for (int t = 0; t < T; t++) {
        __m512 sum = _mm512_setzero_ps();
        for (int f = 0; f < K; f += 32)
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(a.at + t * a.stride + f),
                                   (__m512bh)_mm512_loadu_si512(b.at + t * b.stride + f));
        dots[t] = _mm512_reduce_add_ps(sum);
    }
}

/* Weights and the scores' gradients, 32 x 32, from scores and the weights' gradients. */
static void weigh_back(const float *scores, const float *d_weights, float scale,
                       const float *totals, const float *dots, int diagonal, uint16_t *weights,
                       uint16_t *d_scores, int T) {
    const __m512 by = _mm512_set1_ps(scale * LOG2_E), times = _mm512_set1_ps(scale);
    for (int i = 0; i < 32; i++) {
        const __m512 total = _mm512_set1_ps(totals[i]), dot = _mm512_set1_ps(dots[i]);
        const uint32_t seen = diagonal ? 0xffffffffu >> (31 - i) : 0xffffffffu;
        __m512 p[2], d[2];
        for (int j = 0; j < 2; j++) {
            const __m512 x = _mm512_loadu_ps(scores + 32 * i + 16 * j);
            p[j] = _mm512_maskz_mov_ps(seen >> 16 * j, power(_mm512_fmsub_ps(x, by, total)));
            d[j] = _mm512_sub_ps(_mm512_loadu_ps(d_weights + 32 * i + 16 * j), dot);
            d[j] = _mm512_mul_ps(_mm512_mul_ps(p[j], times), d[j]);
        }
        store(weights + 32 * i, p[0], p[1]);
        store(d_scores + (long)i * T, d[0], d[1]);
    }
}

/* (T, K) sums in groups of 32 columns, as bfloat16. */
static void store_all(const float *sums, int T, int K, Rows to) {
    for (int t = 0; t < T; t++)
        for (int f = 0; f < K; f += 32) {
            const float *from = sums + (long)f * T + 32 * t;
            store(to.at + t * to.stride + f, _mm512_loadu_ps(from), _mm512_loadu_ps(from + 16));
        }
}

static void backward(Rows d, Rows q, Rows k, Rows v, Rows o, const float *totals, int T, int K,
                     float scale, Rows dq, Rows dk, Rows dv, __m512i *room) {
    const long lines = (long)T * K / 32;
    __m512i *const keys = room, *const values = keys + lines, *const key_features = values + lines;
    __m512i *const query_features = key_features + lines;
    __m512i *const d_features = query_features + lines;
    __m512i *const turned = d_features + lines, *const d_turned = turned + QUERIES;
    float *const dk_sums = (float *)(d_turned + QUERIES), *const dv_sums = dk_sums + T * K;
    float *const dots = dv_sums + T * K, scores[32 * 32], d_weights[32 * 32];
    uint16_t *const d_scores = (uint16_t *)(dots + T), weights[QUERIES * 32];
    pack_tokens(k, T, K, keys);
    pack_tokens(v, T, K, values);
    pack_features(k, T, K, key_features);
    pack_features(q, T, K, query_features);
    pack_features(d, T, K, d_features);
    dot_rows(d, o, T, K, dots);
    for (int start = 0; start < T; start += QUERIES) {
        const int end = start + QUERIES < T ? start + QUERIES : T;
        for (int key = 0; key < end; key += 32) {
            const int first = key > start ? key : start, count = (end - first) / 32;
            const Side some_keys = packed(keys + (long)key * K / 32, K / 2);
            const Side some_values = packed(values + (long)key * K / 32, K / 2);
            uint16_t *const ds = d_scores + (long)(first - start) * T + key;
            for (int t = first; t < end; t += 32) {
                const Side queries = in_rows(q.at + t * q.stride, 2 * q.stride);
                const Side gradients = in_rows(d.at + t * d.stride, 2 * d.stride);
                multiply(queries, some_keys, K / 32, 0, 0, scores, 32);
                multiply(gradients, some_values, K / 32, 0, 0, d_weights, 32);
                weigh_back(scores, d_weights, scale, totals + t, dots + t, t == key,
                           weights + 32 * (t - first), ds + (long)(t - first) * T, T);
            }
            pack(weights, 0, 32, 0, 32 * count, 1, turned);
            pack(ds, 0, T, 0, 32 * count, 1, d_turned);
            for (int f = 0; f < K; f += 32) {
                const long at = (long)f / 32 * T + first / 2, to = (long)f * T + 32 * key;
                multiply(packed(turned, 16 * count), packed(d_features + at, T / 2), count, 0,
                         start > key, dv_sums + to, 32);
                multiply(packed(d_turned, 16 * count), packed(query_features + at, T / 2), count, 0,
                         start > key, dk_sums + to, 32);
            }
        }
        for (int t = start; t < end; t += 32)
            for (int f = 0; f < K; f += 32) {
                multiply(in_rows(d_scores + (long)(t - start) * T, 2 * T),
                         packed(key_features + (long)f / 32 * T, T / 2), t / 32 + 1, 0, 0, scores,
                         32);
                store_all(scores, 32, 32, (Rows){dq.at + t * dq.stride + f, dq.stride});
            }
    }
    store_all(dk_sums, T, K, dk);
    store_all(dv_sums, T, K, dv);
}

/* Bytes of room for a thread: of numbers in bfloat16 and of sums. */
#define ROOM(T, K) (9L * (T) * (K) * 2 + (T) * (4 + 2L * QUERIES) + 128 * QUERIES)

/* o, (B, T, H, K), and log_totals, (B, H, T), to the base of 2; of q, k and v, with the strides of
   batch, head and token of each. */
void attention(const uint16_t *q, const uint16_t *k, const uint16_t *v, const int64_t *strides,
               int B, int H, int T, int K, float scale, uint16_t *o, float *log_totals, char *room,
               int threads) {
    const Strides *by = (const Strides *)strides, out = {(long)T * H * K, K, (long)H * K};
    #pragma omp parallel num_threads(threads)
    {
        configure();
        #pragma omp for
        for (int i = 0; i < B * H; i++) {
            const int b = i / H, h = i % H;
            forward(rows_of(q, by[0], b, h), rows_of(k, by[1], b, h), rows_of(v, by[2], b, h), T, K,
                    scale * LOG2_E, rows_of(o, out, b, h), log_totals + (long)i * T,
                    (__m512i *)(room + ROOM(T, K) * omp_get_thread_num()));
        }
        release();
    }
}

/* The gradients of q, k and v, (B, T, H, K), from that of o, of which the first strides are. */
void attention_back(const uint16_t *d, const uint16_t *q, const uint16_t *k, const uint16_t *v,
                    const int64_t *strides, const uint16_t *o, const float *log_totals, int B,
                    int H, int T, int K, float scale, uint16_t *dq, uint16_t *dk, uint16_t *dv,
                    char *room, int threads) {
    const Strides *by = (const Strides *)strides, out = {(long)T * H * K, K, (long)H * K};
    #pragma omp parallel num_threads(threads)
    {
        configure();
        #pragma omp for
        for (int i = 0; i < B * H; i++) {
            const int b = i / H, h = i % H;
            backward(rows_of(d, by[0], b, h), rows_of(q, by[1], b, h), rows_of(k, by[2], b, h),
                     rows_of(v, by[3], b, h), rows_of(o, out, b, h), log_totals + (long)i * T, T, K,
                     scale, rows_of(dq, out, b, h), rows_of(dk, out, b, h), rows_of(dv, out, b, h),
                     (__m512i *)(room + ROOM(T, K) * omp_get_thread_num()));
        }
        release();
    }
}
#else
void attention(void) {}
void attention_back(void) {}
#endif
