/* dW += dY^T X for bfloat16 with AMX: the gradient of a layer's weights over the rows of a batch.

   Both matrices are read along their columns, which torch's products do at half their usual rate.
   Here DEPTH rows at a time are first packed into tiles: of 32 rows and 16 columns, pairs of rows
   beside each other, those of dY transposed. Every sum has one order, whatever the threads. */

#if defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)
#include <immintrin.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#define DEPTH 256 /* rows packed at a time */
#define WIDTH 1024 /* columns of dY packed at a time */
#define LINES 16 /* of 64 bytes in a tile */
#define ARCH_REQ_XCOMP_PERM 0x1023 /* of Linux' asm/prctl.h, since 5.16 */
#define XFEATURE_XTILEDATA 18

typedef struct {
    uint8_t palette, start, zero[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} Tiles;

static void configure(void) {
    Tiles tiles = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        tiles.bytes[i] = 64;
        tiles.rows[i] = LINES;
    }
    _tile_loadconfig(&tiles);
}

/* 16 lines of 16 numbers: from both halves of ever larger groups. */
static inline void transpose(__m512i x[LINES]) {
    __m512i y[LINES];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
        y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
        y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
        y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
    }
}

/* 32 columns of `rows` rows, as the tiles of 16 columns and then those of the others. */
static void pack(const uint16_t *from, long stride, int rows, int transposed, __m512i *to) {
    uint16_t order[64];
    for (int i = 0; i < 64; i++) order[i] = i / 2 + i % 2 * 32;
    const __m512i first = _mm512_loadu_si512(order), second = _mm512_loadu_si512(order + 32);
    __m512i *others = to + rows / 32 * LINES;
    for (int row = 0; row < rows; row += 32, to += LINES, others += LINES) {
        __m512i x[LINES], y[LINES];
        for (int i = 0; i < LINES; i++) {
            const uint16_t *line = from + (row + 2 * i) * stride;
            const __m512i a = _mm512_loadu_si512(line), b = _mm512_loadu_si512(line + stride);
            _mm_prefetch(line + 32, _MM_HINT_T0); /* of the next call */
            _mm_prefetch(line + stride + 32, _MM_HINT_T0);
            x[i] = _mm512_permutex2var_epi16(a, first, b);
            y[i] = _mm512_permutex2var_epi16(a, second, b);
        }
        if (transposed) {
            transpose(x);
            transpose(y);
        }
        for (int i = 0; i < LINES; i++) {
            to[i] = x[i];
            others[i] = y[i];
        }
    }
}

/* 32 x 32 sums of `count` pairs of tiles, beginning with what is there if `more`. */
static void multiply(const __m512i *a, const __m512i *b, int count, int more, float *to, long m) {
    const __m512i *a2 = a + count * LINES, *b2 = b + count * LINES;
    float *down = to + 16 * m;
    const long bytes = m * sizeof *to;
    if (more) {
        _tile_loadd(0, to, bytes);
        _tile_loadd(1, to + 16, bytes);
        _tile_loadd(2, down, bytes);
        _tile_loadd(3, down + 16, bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int i = 0; i < count * LINES; i += LINES) {
        _tile_loadd(4, a + i, 64);
        _tile_loadd(5, a2 + i, 64);
        _tile_loadd(6, b + i, 64);
        _tile_loadd(7, b2 + i, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, to, bytes);
    _tile_stored(1, to + 16, bytes);
    _tile_stored(2, down, bytes);
    _tile_stored(3, down + 16, bytes);
}

/* Whether the system lets this process use the tiles. */
void permitted(int *answer) {
    *answer = !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}

/* dw, (n, m), is set to the product, or added to if `more`: of dy, (rows, n) of a matrix with
   `stride` columns, and x, (rows, m); rows, n and m are multiples of 32. `room` takes
   DEPTH * (WIDTH + m) numbers of 16 bits. */
void weight_gradient(const uint16_t *dy, const uint16_t *x, int rows, int n, int stride, int m,
                     int more, float *dw, __m512i *room, int threads) {
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
                    pack(dy + (long)row * stride + column + i, stride, depth, 1,
                         room + (long)i * depth / 32);
                #pragma omp for
                for (int i = 0; i < m; i += 32)
                    pack(x + (long)row * m + i, m, depth, 0, packed_x + (long)i * depth / 32);
                #pragma omp for
                for (int i = 0; i < width; i += 32)
                    for (int j = 0; j < m; j += 32)
                        multiply(room + (long)i * depth / 32, packed_x + (long)j * depth / 32,
                                 depth / 32, more || row, dw + (long)(column + i) * m + j, m);
            }
        _tile_release();
    }
}
#else
void permitted(int *answer) { *answer = 0; }
void weight_gradient(void) {}
#endif
