/* Two products of a ternary layer in tiles: what it makes of integers, and its weights' gradient.

   Integers of 8 bits by trits: at twice the rate of bfloat16, and exact.

   dW += dY^T X, over the rows of a batch: both are read along their columns, which torch's products
   do at half their usual rate. Here DEPTH rows at a time are first packed into tiles: of 32 rows
   and 16 columns, pairs of rows beside each other, those of dY transposed. Every sum has one order,
   whatever the threads. */

#include "tiles.h"

#ifdef HAS_TILES
#define DEPTH 256 /* rows packed at a time */
#define WIDTH 1024 /* columns of dY packed at a time */

#ifdef HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>

#define ARCH_REQ_XCOMP_PERM 0x1023 /* of Linux' asm/prctl.h, since 5.16 */
#define XFEATURE_XTILEDATA 18
#define MORE 0 /* than trits are the bytes that stand for them */

/* 2 where the system lets this process use AMX' tiles, 1 by AVX-512, else 0. */
void kind(int *answer) {
    *answer = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) ? 0 : 2;
}
#else
#define MORE 1 /* since they are unsigned */
void kind(int *answer) { *answer = 1; }
#endif

/* dw, (n, m), is set to the product, or added to if `more`: of dy, (rows, n) of a matrix with
   `stride` columns, and x, (rows, m), which are integers if there are `steps`; rows, n and m are
   multiples of 32. `room` takes DEPTH * (WIDTH + m) numbers of 16 bits. */
void weight_gradient(const uint16_t *dy, const void *x, const float *steps, int rows, int n,
                     int stride, int m, int more, float *dw, __m512i *room, int threads) {
    __m512i *const packed_x = room + DEPTH / 32 * WIDTH;
    #pragma omp parallel num_threads(threads)
    {
        configure();
        for (int column = 0; column < n; column += WIDTH)
            for (int row = 0; row < rows; row += DEPTH) {
                const int width = n - column < WIDTH ? n - column : WIDTH;
                const int depth = rows - row < DEPTH ? rows - row : DEPTH;
                #pragma omp for nowait
                for (int i = 0; i < width; i += 32)
                    pack(dy + (long)row * stride, column + i, stride, 0, depth, 1,
                         room + (long)i * depth / 32);
                #pragma omp for
                for (int i = 0; i < m; i += 32)
                    if (steps)
                        pack((const int8_t *)x + (long)row * m, i, m, steps + row, depth, 0,
                             packed_x + (long)i * depth / 32);
                    else
                        pack((const uint16_t *)x + (long)row * m, i, m, 0, depth, 0,
                             packed_x + (long)i * depth / 32);
                #pragma omp for
                for (int i = 0; i < width; i += 32)
                    for (int j = 0; j < m; j += 32)
                        multiply(packed(room + (long)i * depth / 32, depth / 2),
                                 packed(packed_x + (long)j * depth / 32, depth / 2), depth / 32, 0,
                                 more || row, dw + (long)(column + i) * m + j, m);
            }
        release();
    }
}

/* The signs of 16 rows of weights, (16, m), and MORE, as tiles of 64 columns. */
static void pack_trits(const uint16_t *from, long m, __m512i *to) {
    const __m512i one = _mm512_set1_epi8(1), size = _mm512_set1_epi16(0x7fff);
    for (int column = 0; column < m; column += 64, to += LINES) {
        __m512i x[LINES];
        for (int i = 0; i < LINES; i++) {
            const __m512i a = _mm512_loadu_si512(from + i * m + column);
            const __m512i b = _mm512_loadu_si512(from + i * m + column + 32);
            const __mmask64 there = _mm512_test_epi16_mask(a, size) |
                                    (__mmask64)_mm512_test_epi16_mask(b, size) << 32;
            const __mmask64 minus = _mm512_movepi16_mask(a) |
                                    (__mmask64)_mm512_movepi16_mask(b) << 32;
            const __m512i ones = _mm512_maskz_mov_epi8(there, one);
            x[i] = _mm512_mask_sub_epi8(ones, minus, _mm512_setzero_si512(), ones);
            if (MORE) x[i] = _mm512_add_epi8(x[i], one);
        }
        transpose(x);
        for (int i = 0; i < LINES; i++) to[i] = x[i];
    }
}

/* The sum of m integers. */
static int32_t total(const int8_t *x, int m) {
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < m; i += 64)
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(x + i));
    return _mm512_reduce_add_epi32(sum);
}

/* y, (rows, n), is the product of integers x, (rows, m), of which one is worth the row's step, and
   weights, (n, m), which are 0, s or -s; rows and n are multiples of 32, m of 64. `room` takes
   n * m bytes. */
void ternary_linear(const int8_t *x, const float *steps, const uint16_t *weights, int rows, int n,
                    int m, uint16_t *y, __m512i *room, int threads) {
    const long count = (long)n * m;
    long at = 0;
    while (at < count - 1 && !(weights[at] & 0x7fff)) at++;
    const uint32_t bits = (uint32_t)(weights[at] & 0x7fff) << 16;
    float s;
    memcpy(&s, &bits, sizeof s);
    #pragma omp parallel num_threads(threads)
    {
        configure();
        #pragma omp for
        for (int i = 0; i < n; i += 16)
            pack_trits(weights + (long)i * m, m, room + (long)i * m / 64);
        #pragma omp for
        for (int row = 0; row < rows; row += 32) {
            __m512i less[32];
            for (int i = 0; i < 32; i++)
                less[i] = _mm512_set1_epi32(MORE ? total(x + (long)(row + i) * m, m) : 0);
            for (int column = 0; column < n; column += 32) {
                int32_t sums[32 * 32] __attribute__((aligned(64)));
                multiply(in_rows(x + (long)row * m, m),
                         packed(room + (long)column * m / 64, m / 4), m / 64, 1, 0, sums, 32);
                for (int i = 0; i < 32; i++) {
                    const __m512 by = _mm512_set1_ps(steps[row + i] * s);
                    __m512i *const sum = (__m512i *)(sums + 32 * i);
                    const __m512 a = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[0], less[i]));
                    const __m512 b = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[1], less[i]));
                    store(y + (long)(row + i) * n + column, _mm512_mul_ps(a, by),
                          _mm512_mul_ps(b, by));
                }
            }
        }
        release();
    }
}
#else
void kind(int *answer) { *answer = 0; }
void weight_gradient(void) {}
void ternary_linear(void) {}
#endif
