/* Tiles of 16 lines of 64 bytes: packing, and sums of products of 32 rows and 32 columns. By AMX;
   elsewhere by AVX-512, 8 rows at a time, since their sums fit into its registers. */

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define HAS_TILES
#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define HAS_AMX
#endif
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define LINES 16

#ifdef HAS_AMX
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

static void release(void) { _tile_release(); }
#else
static void configure(void) {}
static void release(void) {}
#endif

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

/* 32 numbers from `at`: of bfloat16, or integers times `step`. */
static inline __m512i load(const void *from, long at, const float *step) {
    if (!step) return _mm512_loadu_si512((const uint16_t *)from + at);
    const __m128i *bytes = (const __m128i *)((const int8_t *)from + at);
    const __m512 a = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes)));
    const __m512 b = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes + 1)));
    const __m512 by = _mm512_set1_ps(*step);
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(b, by), _mm512_mul_ps(a, by));
}

/* 32 columns, from `column`, of `rows` rows, as the tiles of 16 columns and those of the others. */
static inline void pack(const void *from, long column, long stride, const float *steps, int rows,
                        int transposed, __m512i *to) {
    uint16_t order[64];
    for (int i = 0; i < 64; i++) order[i] = i / 2 + i % 2 * 32;
    const __m512i first = _mm512_loadu_si512(order), second = _mm512_loadu_si512(order + 32);
    __m512i *others = to + rows / 32 * LINES;
    for (int row = 0; row < rows; row += 32, to += LINES, others += LINES) {
        __m512i x[LINES], y[LINES];
        for (int i = 0; i < LINES; i++) {
            const long r = row + 2 * i, at = r * stride + column;
            const __m512i a = load(from, at, steps ? steps + r : 0);
            const __m512i b = load(from, at + stride, steps ? steps + r + 1 : 0);
            const char *next = (const char *)from + (at + 32) * (steps ? 1 : 2); /* call's */
            _mm_prefetch(next, _MM_HINT_T0);
            _mm_prefetch(next + stride * (steps ? 1 : 2), _MM_HINT_T0);
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

/* Two rows of tiles: how many bytes from one line to the next, and from one tile to the next. */
typedef struct {
    const char *first, *second;
    long line, tile;
} Side;

static inline Side packed(const __m512i *first, long second) {
    return (Side){(const char *)first, (const char *)(first + second), 64, 64 * LINES};
}

static inline Side in_rows(const void *first, long bytes) {
    return (Side){first, (const char *)first + 16 * bytes, bytes, 64};
}

/* 32 x 32 sums, of `m` columns, of `count` pairs of tiles, beginning with what is there if `more`:
   of 8-bit integers, or of bfloat16 in float. */
#ifdef HAS_AMX
static inline void multiply(Side a, Side b, int count, int integers, int more, void *sums, long m) {
    int32_t *to = sums, *down = to + 16 * m;
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
    for (int i = 0; i < count; i++) {
        _tile_loadd(4, a.first + i * a.tile, a.line);
        _tile_loadd(5, a.second + i * a.tile, a.line);
        _tile_loadd(6, b.first + i * b.tile, b.line);
        _tile_loadd(7, b.second + i * b.tile, b.line);
        if (integers) {
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 4, 7);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        } else {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, to, bytes);
    _tile_stored(1, to + 16, bytes);
    _tile_stored(2, down, bytes);
    _tile_stored(3, down + 16, bytes);
}
#else
#define ROWS 8

/* ROWS rows of them. Integers of b are unsigned here, those of a have a sign, as dpbusd wants. */
static inline __attribute__((always_inline)) void multiply_rows(
    const char *a, long line, long tile, Side b, int count, int integers, int more, int32_t *to,
    long m) {
    __m512i sums[ROWS][2];
    #pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < 2; j++)
            sums[r][j] = more ? _mm512_loadu_si512(to + r * m + 16 * j) : _mm512_setzero_si512();
    for (int i = 0; i < count; i++)
        for (int at = 0; at < LINES; at++) {
            const __m512i first = _mm512_loadu_si512(b.first + i * b.tile + at * b.line);
            const __m512i second = _mm512_loadu_si512(b.second + i * b.tile + at * b.line);
            #pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                int32_t four;
                memcpy(&four, a + r * line + i * tile + 4 * at, 4);
                const __m512i by = _mm512_set1_epi32(four);
                if (integers) {
                    sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], first, by);
                    sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], second, by);
                } else {
                    sums[r][0] = (__m512i)_mm512_dpbf16_ps((__m512)sums[r][0], (__m512bh)first,
                                                           (__m512bh)by);
                    sums[r][1] = (__m512i)_mm512_dpbf16_ps((__m512)sums[r][1], (__m512bh)second,
                                                           (__m512bh)by);
                }
            }
        }
    #pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < 2; j++) _mm512_storeu_si512(to + r * m + 16 * j, sums[r][j]);
}

static inline void multiply(Side a, Side b, int count, int integers, int more, void *sums, long m) {
    for (int row = 0; row < 32; row += ROWS) {
        const char *rows = (row < 16 ? a.first : a.second) + row % 16 * a.line;
        int32_t *to = (int32_t *)sums + row * m;
        if (integers)
            multiply_rows(rows, a.line, a.tile, b, count, 1, more, to, m);
        else
            multiply_rows(rows, a.line, a.tile, b, count, 0, more, to, m);
    }
}
#endif

/* 32 numbers of 32 bits as bfloat16. */
static inline void store(uint16_t *to, __m512 a, __m512 b) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}
#endif
