#include <math.h>
#include <stdint.h>

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

/* The products of x, (B, I), rounded to 8 bits, and n ternary matrices, (O[m], I), packed as by
   BitLinear.set_ternary, side by side in y, (B, sum of O). q: room for one row of whole numbers. */
void ternary_linear(const float *x, int B, int I, int n, const uint8_t **w,
                    const float *weight_scale, const int *O, float *y, int16_t *q, int threads) {
    const int J = (I + 3) / 4;
    const int16_t *q0 = q, *q1 = q + J, *q2 = q + 2 * J, *q3 = q + 3 * J;
    for (int b = 0; b < B; b++, x += I) {
        float top = 1e-5f;
        for (int i = 0; i < I; i++) top = fmaxf(top, fabsf(x[i]));
        const float scale = 1.0f / top * 127.0f;  /* torch's way to divide a number by a tensor */
        int32_t sum = 0;                          /* for the codes are trits + 1 */
        for (int i = 0; i < 4 * J; i++) sum += q[i] = i < I ? (int16_t)rintf(x[i] * scale) : 0;
        #pragma omp parallel num_threads(threads) if (threads > 1)
        for (int m = 0, first = 0; m < n; first += O[m++]) {
            #pragma omp for nowait
            for (int o = 0; o < O[m]; o++) {
                const uint8_t *row = w[m] + (int64_t)o * J;
                int32_t dot = 0;
                for (int j = 0; j < J; j++) {
                    const int16_t c = row[j];
                    dot += (int16_t)(c & 3) * q0[j] + (int16_t)(c >> 2 & 3) * q1[j]
                         + (int16_t)(c >> 4 & 3) * q2[j] + (int16_t)(c >> 6) * q3[j];
                }
                y[first + o] = (float)(dot - sum) * (weight_scale[m] / scale);
            }
        }
        for (int m = 0; m < n; m++) y += O[m];
    }
}
