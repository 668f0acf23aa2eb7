#include <math.h>
#include <stdint.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

/* y = x / sqrt(mean(x^2) + eps) * weight for B rows of I numbers. */
void rms_norm(const float *x, const float *weight, float eps, int B, int I, float *y) {
    for (int b = 0; b < B; b++, x += I, y += I) {
        float sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (int i = 0; i < I; i++) sum += x[i] * x[i];
        const float factor = 1 / sqrtf(sum / I + eps);
        for (int i = 0; i < I; i++) y[i] = x[i] * factor * weight[i];
    }
}

/* The sum of q and a row's codes multiplied, J bytes of four each: byte j has the codes of q[j],
   q[J + j], q[2 J + j] and q[3 J + j]. Whole numbers: the same in any order. */
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
static int32_t dot(const uint8_t *row, const int8_t *q, int J) {
    const __m512i low = _mm512_set1_epi8(3);
    __m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
                      _mm512_setzero_si512()};
    for (int j = 0; j < J; j += 64) {
        const __mmask64 mask = J - j < 64 ? (1ull << (J - j)) - 1 : ~0ull;
        __m512i codes = _mm512_maskz_loadu_epi8(mask, row + j);
        for (int k = 0; k < 4; k++, codes = _mm512_srli_epi16(codes, 2)) {
            const __m512i part = _mm512_maskz_loadu_epi8(mask, q + k * J + j);
            sum[k] = _mm512_dpbusd_epi32(sum[k], _mm512_and_si512(codes, low), part);
        }
    }
    return _mm512_reduce_add_epi32(_mm512_add_epi32(_mm512_add_epi32(sum[0], sum[1]),
                                                    _mm512_add_epi32(sum[2], sum[3])));
}
#else
static int32_t dot(const uint8_t *row, const int8_t *q, int J) {
    int32_t sum = 0;
    int j = 0;
#ifdef __AVX2__
    const __m256i low = _mm256_set1_epi8(3), one = _mm256_set1_epi16(1);
    __m256i sums = _mm256_setzero_si256();
    for (; j + 32 <= J; j += 32) {
        __m256i codes = _mm256_loadu_si256((const __m256i *)(row + j));
        __m256i few = _mm256_setzero_si256();  /* 16 bits hold eight products of 2 x 127 */
        for (int k = 0; k < 4; k++, codes = _mm256_srli_epi16(codes, 2)) {
            const __m256i part = _mm256_loadu_si256((const __m256i *)(q + k * J + j));
            few = _mm256_add_epi16(few, _mm256_maddubs_epi16(_mm256_and_si256(codes, low), part));
        }
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(few, one));
    }
    int32_t eight[8];
    _mm256_storeu_si256((__m256i *)eight, sums);
    for (int k = 0; k < 8; k++) sum += eight[k];
#endif
    for (; j < J; j++) {
        const int16_t c = row[j];
        sum += (int16_t)(c & 3) * q[j] + (int16_t)(c >> 2 & 3) * q[J + j]
             + (int16_t)(c >> 4 & 3) * q[2 * J + j] + (int16_t)(c >> 6) * q[3 * J + j];
    }
    return sum;
}
#endif

/* The products of x, (B, I), rounded to 8 bits, and n ternary matrices, (O[m], I), packed as by
   BitLinear.set_ternary, side by side in y, (B, sum of O). q: room for one row of whole numbers. */
void ternary_linear(const float *x, int B, int I, int n, const uint8_t **w,
                    const float *weight_scale, const int *O, float *y, int8_t *q, int threads) {
    const int J = (I + 3) / 4;
    for (int b = 0; b < B; b++, x += I) {
        float top = 1e-5f;
        for (int i = 0; i < I; i++) top = fmaxf(top, fabsf(x[i]));
        const float scale = 1.0f / top * 127.0f;  /* torch's way to divide a number by a tensor */
        int32_t sum = 0;                          /* for the codes are trits + 1 */
        for (int i = 0; i < 4 * J; i++) sum += q[i] = i < I ? (int8_t)rintf(x[i] * scale) : 0;
        #pragma omp parallel num_threads(threads) if (threads > 1)
        for (int m = 0, first = 0; m < n; first += O[m++]) {
            #pragma omp for nowait
            for (int o = 0; o < O[m]; o++) {
                const int32_t product = dot(w[m] + (int64_t)o * J, q, J) - sum;
                y[first + o] = (float)product * (weight_scale[m] / scale);
            }
        }
        for (int m = 0; m < n; m++) y += O[m];
    }
}
