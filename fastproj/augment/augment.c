/* The augmentation chain on a CPU. Each crop goes through all its operations while it is in cache;
 * operations that were not sampled are skipped. chain.py holds the same operations for other
 * devices; the tests compare this file with it and with torchvision. native.py declares the same
 * struct.
 *
 * The compiler vectorizes the loops, once for each kind of processor (not if PLAIN is defined, for
 * the tests). Pixels are planar floats from 0 to 1.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define CHANNELS 3
#define BLOCK 2048  /* pixels that go through the blends together: three planes fit the L1 cache */

#define LANES 16
#define SLACK (2 * LANES)
typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* Older compilers do not dispatch by the names of processors' levels. */
#if defined(__x86_64__) && defined(__linux__) && !defined(PLAIN) && \
    (__GNUC__ >= 12 || __clang_major__ >= 18)
#define FOR_EACH_PROCESSOR \
    __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline))

enum { BRIGHTNESS, CONTRAST, SATURATION, HUE, OPERATIONS };

typedef struct {
    const uint8_t *crops;  /* (samples, height, width, 3) */
    float *out;            /* (samples, height, width, 3) */
    int64_t samples, height, width, reach;
    const uint8_t *flip;  /* (samples), as the others except place */
    const int64_t *place; /* (samples, 4) */
    const float *brightness, *contrast, *saturation, *hue;  /* hue in turns */
    const uint8_t *gray;
    const float *sigma;
    const uint8_t *solarize;
    const float *scale, *shift; /* (3) */
    int64_t next;               /* the first sample that no thread has taken */
} Batch;

typedef struct {
    float *red, *green, *blue;
} Planes;

INLINE float clamp(float x) { return x < 0 ? 0 : x > 1 ? 1 : x; }

INLINE float luma(float red, float green, float blue) {
    return 0.2989f * red + 0.587f * green + 0.114f * blue;
}

INLINE void read_crop(Planes p, const uint8_t *restrict crop, int64_t n) {
    float *restrict red = p.red, *restrict green = p.green, *restrict blue = p.blue;
    for (int64_t i = 0; i < n; i++) {
        red[i] = crop[CHANNELS * i] * (1.0f / 255);
        green[i] = crop[CHANNELS * i + 1] * (1.0f / 255);
        blue[i] = crop[CHANNELS * i + 2] * (1.0f / 255);
    }
}

INLINE void make_gray(Planes p, int64_t n) {
    float *restrict red = p.red, *restrict green = p.green, *restrict blue = p.blue;
    for (int64_t i = 0; i < n; i++) red[i] = green[i] = blue[i] = luma(red[i], green[i], blue[i]);
}

/* Blend each pixel with its own gray (saturation), or with the given one (contrast: the mean;
 * brightness: 0, black). */
INLINE void blend(Planes p, int64_t n, float factor, int own, float gray) {
    float *restrict red = p.red, *restrict green = p.green, *restrict blue = p.blue;
    for (int64_t i = 0; i < n; i++) {
        float rest = (1 - factor) * (own ? luma(red[i], green[i], blue[i]) : gray);
        red[i] = clamp(factor * red[i] + rest);
        green[i] = clamp(factor * green[i] + rest);
        blue[i] = clamp(factor * blue[i] + rest);
    }
}

/* As chain._shift_hue: each channel is min + (max - min) x a trapezium in h. */
INLINE void shift_hue(Planes p, int64_t n, float turns) {
    float *restrict red = p.red, *restrict green = p.green, *restrict blue = p.blue;
    for (int64_t i = 0; i < n; i++) {
        float r = red[i], g = green[i], b = blue[i];
        float high = r > g ? r : g, low = r > g ? g : r;
        high = high > b ? high : b;
        low = low < b ? low : b;
        float chroma = high - low, inverse = 1 / (chroma > 1e-12f ? chroma : 1e-12f);
        float hue = high == r   ? (g - b) * inverse
                    : high == g ? 2 + (b - r) * inverse
                                : 4 + (r - g) * inverse;
        hue += 6 * turns;
        hue -= 6 * floorf(hue * (1.0f / 6));
        red[i] = low + chroma * clamp(fabsf(hue - 3) - 1);
        green[i] = low + chroma * clamp(2 - fabsf(hue - 2));
        blue[i] = low + chroma * clamp(2 - fabsf(hue - 4));
    }
}

INLINE float mean_luma(Planes p, int64_t n) {
    double sum = 0;
    for (int64_t start = 0; start < n; start += BLOCK) {
        int64_t end = start + BLOCK < n ? start + BLOCK : n;
        float part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t i = start; i < end; i++) part += luma(p.red[i], p.green[i], p.blue[i]);
        sum += part;
    }
    return (float)(sum / n);
}

/* The operations from place first to place last - 1. mean: of the image just before contrast. */
INLINE void blends(Planes all, int64_t n, const int *order, const float *value, int first, int last,
                   float mean) {
    for (int64_t start = 0; start < n; start += BLOCK) {
        int64_t count = n - start < BLOCK ? n - start : BLOCK;
        Planes p = {all.red + start, all.green + start, all.blue + start};
        for (int place = first; place < last; place++) {
            int operation = order[place];
            float x = value[operation];
            if (operation == HUE ? x == 0 : x == 1) continue;
            if (operation == HUE) shift_hue(p, count, x);
            else if (operation == SATURATION) blend(p, count, x, 1, 0);
            else blend(p, count, x, 0, operation == CONTRAST ? mean : 0);
        }
    }
}

INLINE void jitter(const Batch *batch, int64_t sample, Planes p, int64_t n) {
    const float value[OPERATIONS] = {
        [BRIGHTNESS] = batch->brightness[sample],
        [CONTRAST] = batch->contrast[sample],
        [SATURATION] = batch->saturation[sample],
        [HUE] = batch->hue[sample],
    };
    const int64_t *place = batch->place + OPERATIONS * sample;
    int order[OPERATIONS];
    for (int i = 0; i < OPERATIONS; i++) order[place[i]] = i;
    int contrast = value[CONTRAST] == 1 ? OPERATIONS : (int)place[CONTRAST];
    blends(p, n, order, value, 0, contrast, 0);
    if (contrast < OPERATIONS)
        blends(p, n, order, value, contrast, OPERATIONS, mean_luma(p, n));
}

/* out[i] = tap[0] in[i] + sum over k of tap[k] (in[i - k stride] + in[i + k stride]). It reads and
 * writes whole pairs of vectors, up to SLACK floats past the end: scratch, or overwritten next. */
INLINE void weigh(float *restrict out, const float *restrict in, int64_t n, int64_t stride,
                  const float *tap, int64_t reach) {
    for (int64_t i = 0; i < n; i += 2 * LANES) {
        const Vector *left = (const Vector *)(in + i), *right = (const Vector *)(in + i + LANES);
        Vector first = tap[0] * *left, second = tap[0] * *right;
        for (int64_t k = 1; k <= reach; k++) {
            const float *before = in + i - k * stride, *after = in + i + k * stride;
            first += tap[k] * (*(const Vector *)before + *(const Vector *)after);
            before += LANES, after += LANES;
            second += tap[k] * (*(const Vector *)before + *(const Vector *)after);
        }
        *(Vector *)(out + i) = first;
        *(Vector *)(out + i + LANES) = second;
    }
}

/* Blur one plane. padded and across have room for reach more rows and columns on every side. */
INLINE void blur(float *plane, int64_t height, int64_t width, const float *tap, int64_t reach,
                 float *padded, float *across) {
    int64_t pitch = width + 2 * reach, start = reach * pitch;
    for (int64_t y = 0; y < height; y++) {
        const float *from = plane + y * width;
        float *to = padded + start + y * pitch + reach;
        for (int64_t x = 0; x < width; x++) to[x] = from[x];
        for (int64_t k = 1; k <= reach; k++) {
            to[-k] = from[k];
            to[width - 1 + k] = from[width - 1 - k];
        }
    }
    /* Rows are contiguous, so one loop does all of them. Its results in the margins are not used. */
    weigh(across + start, padded + start, height * pitch, 1, tap, reach);
    float *top = across + start, *bottom = top + (height - 1) * pitch;
    for (int64_t k = 1; k <= reach; k++) {
        memcpy(top - k * pitch, top + k * pitch, pitch * sizeof(float));
        memcpy(bottom + k * pitch, bottom - k * pitch, pitch * sizeof(float));
    }
    for (int64_t y = 0; y < height; y++)
        weigh(plane + y * width, top + y * pitch + reach, width, pitch, tap, reach);
}

/* tap[0 .. reach] of a Gaussian whose 2 reach + 1 taps sum to 1, as torchvision's kernel of that
 * size. Returns the reach without outer taps too small to change a float of 1. */
static int64_t gaussian(float sigma, int64_t reach, float *tap) {
    double sum = 1;
    for (int64_t k = 1; k <= reach; k++) sum += 2 * exp(-0.5 * k * k / ((double)sigma * sigma));
    for (int64_t k = 0; k <= reach; k++)
        tap[k] = (float)(exp(-0.5 * k * k / ((double)sigma * sigma)) / sum);
    while (reach > 0 && tap[reach] < 0x1p-26f) reach--;
    return reach;
}

/* Floats that a thread needs: three planes, two padded planes, one row per channel, the taps. */
static int64_t plane_floats(const Batch *batch) { return batch->height * batch->width + SLACK; }

static int64_t padded_floats(const Batch *batch) {
    return (batch->height + 2 * batch->reach) * (batch->width + 2 * batch->reach) + SLACK;
}

static int64_t scratch_floats(const Batch *batch) {
    return CHANNELS * (plane_floats(batch) + batch->width) + 2 * padded_floats(batch)
           + batch->reach + 1;
}

/* Normalize one row and write it to the output. */
INLINE void write_row(float *restrict out, const float *restrict red, const float *restrict green,
                      const float *restrict blue, int64_t width, const float *scale,
                      const float *shift) {
    float s0 = scale[0], s1 = scale[1], s2 = scale[2], t0 = shift[0], t1 = shift[1], t2 = shift[2];
    for (int64_t x = 0; x < width; x++) {
        out[CHANNELS * x] = red[x] * s0 + t0;
        out[CHANNELS * x + 1] = green[x] * s1 + t1;
        out[CHANNELS * x + 2] = blue[x] * s2 + t2;
    }
}

INLINE void mirror_row(float *restrict out, const float *restrict in, int64_t width) {
    for (int64_t x = 0; x < width; x++) out[x] = in[width - 1 - x];
}

FOR_EACH_PROCESSOR
static void augment(const Batch *batch, int64_t sample, float *scratch) {
    int64_t height = batch->height, width = batch->width, n = height * width;
    int64_t plane = plane_floats(batch);
    Planes p = {scratch, scratch + plane, scratch + 2 * plane};
    float *padded = scratch + CHANNELS * plane, *across = padded + padded_floats(batch);
    float *row = across + padded_floats(batch), *tap = row + CHANNELS * width;

    read_crop(p, batch->crops + CHANNELS * n * sample, n);
    jitter(batch, sample, p, n);
    if (batch->gray[sample]) make_gray(p, n);
    if (batch->sigma[sample] > 0) {
        int64_t reach = gaussian(batch->sigma[sample], batch->reach, tap);
        for (int channel = 0; reach > 0 && channel < CHANNELS; channel++)
            blur(scratch + plane * channel, height, width, tap, reach, padded, across);
    }
    if (batch->solarize[sample])
        for (int64_t i = 0; i < CHANNELS * plane; i++)
            scratch[i] = scratch[i] >= 0.5f ? 1 - scratch[i] : scratch[i];
    /* Flipping commutes with these operations, so it may come last, row by row. */
    for (int64_t y = 0; y < height; y++) {
        int64_t at = y * width;
        const float *r = p.red + at, *g = p.green + at, *b = p.blue + at;
        if (batch->flip[sample]) {
            mirror_row(row, r, width);
            mirror_row(row + width, g, width);
            mirror_row(row + 2 * width, b, width);
            r = row, g = row + width, b = row + 2 * width;
        }
        float *out = batch->out + CHANNELS * (n * sample + at);
        write_row(out, r, g, b, width, batch->scale, batch->shift);
    }
}

/* Augments samples that no other thread has taken until none is left. Returns 0, or 1 if memory
 * runs out. */
int fastproj_augment(Batch *batch) {
    float *scratch = malloc(scratch_floats(batch) * sizeof(float));
    while (scratch) {
        int64_t sample = __atomic_fetch_add(&batch->next, 1, __ATOMIC_RELAXED);
        if (sample >= batch->samples) break;
        augment(batch, sample, scratch);
    }
    free(scratch);
    return !scratch;
}
