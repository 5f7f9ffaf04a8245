/* Decode and crop stored images without Python's lock: libjpeg-turbo decodes the part of an image
 * that its views need, then each view is cut out and resized (bilinear, antialiased).
 *
 * The decoder has Pillow's settings (accurate DCT, smooth chroma upsampling). Rows and columns
 * outside the box are not decoded, which changes no pixel inside. The resize is torch's for uint8
 * tensors (torch/aten native/cpu/UpSampleKernelAVXAntialias.h, after Pillow-SIMD): 16-bit integer
 * weights, first horizontal, rounded to bytes, then vertical. The sums are integers, so AVX2 and the
 * plain loops give the same bits as torch.
 *
 * fill.py declares the same structs and documents them. PLAIN disables AVX2 (for the tests),
 * WITHOUT_JPEG the decoder (where no libjpeg was found): fill.py then refuses JPEGs.
 */
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef WITHOUT_JPEG
#include <jpeglib.h>
#endif

#if defined(__x86_64__) && !defined(PLAIN)
#include <immintrin.h>
#endif

#define CHANNELS 3
#define OVERREAD 64  /* bytes that a vector may read past the end of a scratch buffer */
#define RAW 1
#define MESSAGE_BYTES 200  /* libjpeg's JMSG_LENGTH_MAX */

typedef struct {
    int64_t top, left, height, width;
} Box;

typedef struct {
    const Box *boxes;  /* (views, batch) */
    uint8_t *out;      /* (views, batch, size, size, 3) */
    int64_t views, size;
} CropSpec;

typedef struct {
    const uint8_t *data;  /* the mapped file; the allocation table follows the last image */
    const int64_t *positions;  /* (batch) */
    const uint8_t *mode;       /* (samples), as the next four: the whole beton's */
    const int64_t *width, *height, *pointer, *length;
    int64_t batch;
    int64_t num_crops;
    const CropSpec *crops;  /* (num_crops) */
    uint8_t *padded;  /* (batch, rows, columns, 3): decode to here and do not crop, unless NULL */
    int64_t rows, columns;
    int64_t next;  /* the first slot that no thread has taken */
} Batch;

typedef struct {
    uint8_t *bytes;
    size_t size;
} Buffer;

typedef struct {  /* how one axis is resized */
    int taps;     /* per output pixel, an even number; unused ones have weight 0 */
    int shift;    /* 1 << shift stands for a weight of 1 */
    int32_t *first;   /* (size): first input pixel */
    int16_t *weight;  /* (size, taps) */
} Axis;

static uint8_t *reserve(Buffer *buffer, size_t size) {
    if (buffer->size < size + OVERREAD) {
        free(buffer->bytes);
        buffer->size = size + size / 4 + OVERREAD;
        buffer->bytes = calloc(buffer->size, 1);
        if (!buffer->bytes) buffer->size = 0;
    }
    return buffer->bytes;
}

/* Decoding */

int fastproj_has_jpeg(void) {
#ifdef WITHOUT_JPEG
    return 0;
#else
    return 1;
#endif
}

#ifdef WITHOUT_JPEG
typedef struct {
    char *text;
} Decoder;

static int open_decoder(Decoder *decoder, char *text) {
    decoder->text = text;
    return 0;
}

static int decode(Decoder *decoder, const uint8_t *stored, int64_t length, int64_t height,
                  int64_t width, Box box, uint8_t *out, int64_t pitch) {
    strcpy(decoder->text, "built without libjpeg");
    return -1;
}

static void close_decoder(Decoder *decoder) {}
#else
typedef struct {
    struct jpeg_error_mgr base;
    jmp_buf escape;
    char *text;
} Errors;

typedef struct {
    struct jpeg_decompress_struct info;
    Errors errors;
} Decoder;

static void fail(j_common_ptr info) {
    Errors *errors = (Errors *)info->err;
    errors->base.format_message(info, errors->text);
    longjmp(errors->escape, 1);
}

static void warn(j_common_ptr info, int level) {
    if (level < 0) fail(info);  /* corrupt data: libjpeg would continue with gray pixels */
}

/* Returns 0, or -1 with the reason in `text`. */
static int open_decoder(Decoder *decoder, char *text) {
    decoder->info.err = jpeg_std_error(&decoder->errors.base);
    decoder->errors.base.error_exit = fail;
    decoder->errors.base.emit_message = warn;
    decoder->errors.text = text;
    if (setjmp(decoder->errors.escape)) return -1;  /* the libjpeg loaded is not the header's version */
    jpeg_create_decompress(&decoder->info);
    return 0;
}

/* Decodes `box` of a JPEG into `out`, the address of the whole image's first pixel, with rows `pitch`
 * bytes apart. Returns 0, or -1 with the decoder's text. */
static int decode(Decoder *decoder, const uint8_t *stored, int64_t length, int64_t height,
                  int64_t width, Box box, uint8_t *out, int64_t pitch) {
    struct jpeg_decompress_struct *info = &decoder->info;
    Errors *errors = &decoder->errors;
    if (setjmp(errors->escape)) return -1;
    jpeg_mem_src(info, stored, length);
    jpeg_read_header(info, TRUE);
    if (info->image_height != height || info->image_width != width) {
        snprintf(errors->text, MESSAGE_BYTES, "it has %u x %u pixels, its row says %d x %d",
                 info->image_width, info->image_height, (int)width, (int)height);
        return -1;
    }
    info->out_color_space = JCS_RGB;
    info->dct_method = JDCT_ISLOW;
    jpeg_start_decompress(info);
    /* Chroma upsampling reads neighbors: decode two more pixels on each side inside the image. */
    JDIMENSION left = box.left > 2 ? box.left - 2 : 0;
    JDIMENSION columns = (box.left + box.width + 2 < width ? box.left + box.width + 2 : width) - left;
    if (columns < info->output_width) jpeg_crop_scanline(info, &left, &columns);
    if (box.top > 0) jpeg_skip_scanlines(info, box.top);
    while (info->output_scanline < box.top + box.height) {
        JSAMPROW rows[16];
        for (int i = 0; i < 16; i++)
            rows[i] = out + (info->output_scanline + i) * pitch + (int64_t)left * CHANNELS;
        int64_t rest = box.top + box.height - info->output_scanline;
        jpeg_read_scanlines(info, rows, rest < 16 ? rest : 16);
    }
    if (info->output_scanline == info->output_height)
        jpeg_finish_decompress(info);  /* warns of coded bytes that are left over */
    else
        jpeg_abort_decompress(info);
    return 0;
}

static void close_decoder(Decoder *decoder) { jpeg_destroy_decompress(&decoder->info); }
#endif

/* Resizing */

/* Weights of one axis as torch computes them: in double, then scaled by the largest power of two
 * for which all fit into 16 bits. */
static int plan(Axis *axis, Buffer *buffer, int64_t length, int64_t size) {
    double scale = (double)length / size;
    double support = scale >= 1 ? scale : 1.0;
    int taps = 2 * (int)ceil(support) + 2;
    taps += taps & 1;
    size_t bytes = size * (sizeof(double) * taps + sizeof(int32_t) + sizeof(int16_t) * taps);
    if (!reserve(buffer, bytes)) return -1;
    double *exact = (double *)buffer->bytes;
    axis->first = (int32_t *)(exact + size * taps);
    axis->weight = (int16_t *)(axis->first + size);
    axis->taps = 2;
    double inverse = scale >= 1 ? 1 / scale : 1.0, largest = 0;
    for (int64_t i = 0; i < size; i++) {
        double center = scale * (i + 0.5), total = 0;
        int64_t first = (int64_t)(center - support + 0.5), end = (int64_t)(center + support + 0.5);
        first = first > 0 ? first : 0;
        end = end < length ? end : length;
        int count = (int)(end - first);
        for (int k = 0; k < count; k++) {
            double distance = fabs((k + first - center + 0.5) * inverse);
            total += exact[i * taps + k] = distance < 1 ? 1 - distance : 0;
        }
        for (int k = 0; k < count; k++) {
            exact[i * taps + k] /= total;
            if (exact[i * taps + k] > largest) largest = exact[i * taps + k];
        }
        for (int k = count; k < taps; k++) exact[i * taps + k] = 0;
        axis->first[i] = (int32_t)first;
        if (count > axis->taps) axis->taps = count + (count & 1);
    }
    axis->shift = 0;
    while (axis->shift < 22 && (int)(0.5 + largest * (1 << (axis->shift + 1))) < 1 << 15)
        axis->shift++;
    for (int64_t i = 0; i < size; i++) {
        /* Near the end of the box start earlier: taps of weight 0 are read too. */
        int64_t last = length > axis->taps ? length - axis->taps : 0;
        int late = axis->first[i] > last ? (int)(axis->first[i] - last) : 0;
        axis->first[i] -= late;
        for (int k = 0; k < axis->taps; k++)
            axis->weight[i * axis->taps + k] =
                k < late ? 0 : (int16_t)(int)(0.5 + exact[i * taps + k - late] * (1 << axis->shift));
    }
    return 0;
}

static uint8_t clip(int32_t value) { return value < 0 ? 0 : value > 255 ? 255 : value; }

static void across_plain(const Axis *axis, const uint8_t *in, int64_t in_pitch, int64_t rows,
                         uint8_t *out, int64_t out_pitch, int64_t size) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < size; i++)
            for (int c = 0; c < CHANNELS; c++) {
                const uint8_t *pixel = in + row * in_pitch + axis->first[i] * CHANNELS + c;
                int32_t sum = 1 << (axis->shift - 1);
                for (int k = 0; k < axis->taps; k++)
                    sum += axis->weight[i * axis->taps + k] * pixel[k * CHANNELS];
                out[row * out_pitch + i * CHANNELS + c] = clip(sum >> axis->shift);
            }
}

static void down_plain(const Axis *axis, const uint8_t *in, int64_t pitch, int64_t rows,
                       int64_t from, int64_t bytes, uint8_t *out, int64_t out_pitch, int64_t size) {
    for (int64_t i = 0; i < size; i++)
        for (int64_t x = from; x < bytes; x++) {
            int32_t sum = 1 << (axis->shift - 1);
            for (int k = 0; k < axis->taps && axis->first[i] + k < rows; k++)
                sum += axis->weight[i * axis->taps + k] * in[(axis->first[i] + k) * pitch + x];
            out[i * out_pitch + x] = clip(sum >> axis->shift);
        }
}

#if defined(__x86_64__) && !defined(PLAIN)
#define AVX2 __attribute__((target("avx2")))

/* Two rows at a time, one in each half of a register; four output pixels per store. */
AVX2 static void across_avx2(const Axis *axis, const uint8_t *in, int64_t in_pitch, int64_t rows,
                             uint8_t *out, int64_t out_pitch, int64_t size) {
    /* Widen pixels 0 and 1 (pair), or 2 and 3 (next), to 16 bits in the order r r g g b b. */
    const __m256i pair = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
    const __m256i next = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1));
    const __m256i close = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    const __m256i half = _mm256_set1_epi32(1 << (axis->shift - 1));
    const __m128i shift = _mm_cvtsi32_si128(axis->shift);
    const int taps = axis->taps;
    for (int64_t row = 0; row < rows; row += 2) {
        const uint8_t *one = in + row * in_pitch;
        const uint8_t *two = row + 1 < rows ? one + in_pitch : one;
        uint8_t *out_one = out + row * out_pitch;
        uint8_t *out_two = row + 1 < rows ? out_one + out_pitch : out_one;
        for (int64_t i = 0; i < size; i += 4) {
            __m256i sum[4];
            for (int j = 0; j < 4; j++) {
                int64_t pixel = i + j < size ? i + j : size - 1;
                int64_t at = (int64_t)axis->first[pixel] * CHANNELS;
                const int16_t *weight = axis->weight + pixel * taps;
                __m256i total = half;
                int k = 0;
                for (; k + 2 < taps; k += 4, at += 4 * CHANNELS) {
                    __m256i pixels = _mm256_inserti128_si256(
                        _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(one + at))),
                        _mm_loadu_si128((const __m128i *)(two + at)), 1);
                    int32_t w01, w23;
                    memcpy(&w01, weight + k, 4);
                    memcpy(&w23, weight + k + 2, 4);
                    total = _mm256_add_epi32(total, _mm256_madd_epi16(
                        _mm256_shuffle_epi8(pixels, pair), _mm256_set1_epi32(w01)));
                    total = _mm256_add_epi32(total, _mm256_madd_epi16(
                        _mm256_shuffle_epi8(pixels, next), _mm256_set1_epi32(w23)));
                }
                if (k < taps) {
                    __m256i pixels = _mm256_inserti128_si256(
                        _mm256_castsi128_si256(_mm_loadl_epi64((const __m128i *)(one + at))),
                        _mm_loadl_epi64((const __m128i *)(two + at)), 1);
                    int32_t w01;
                    memcpy(&w01, weight + k, 4);
                    total = _mm256_add_epi32(total, _mm256_madd_epi16(
                        _mm256_shuffle_epi8(pixels, pair), _mm256_set1_epi32(w01)));
                }
                sum[j] = _mm256_sra_epi32(total, shift);
            }
            __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(sum[0], sum[1]),
                                                _mm256_packs_epi32(sum[2], sum[3]));
            bytes = _mm256_shuffle_epi8(bytes, close);
            _mm_storeu_si128((__m128i *)(out_one + i * CHANNELS), _mm256_castsi256_si128(bytes));
            _mm_storeu_si128((__m128i *)(out_two + i * CHANNELS), _mm256_extracti128_si256(bytes, 1));
        }
    }
}

AVX2 static void down_avx2(const Axis *axis, const uint8_t *in, int64_t pitch, int64_t rows,
                           int64_t bytes, uint8_t *out, int64_t out_pitch, int64_t size) {
    const __m256i zero = _mm256_setzero_si256();
    const __m256i half = _mm256_set1_epi32(1 << (axis->shift - 1));
    const __m128i shift = _mm_cvtsi32_si128(axis->shift);
    for (int64_t i = 0; i < size; i++) {
        const uint8_t *from = in + axis->first[i] * pitch;
        int taps = axis->taps;
        for (int64_t x = 0; x + 32 <= bytes; x += 32) {
            __m256i a = half, b = half, c = half, d = half;
            for (int k = 0; k < taps; k += 2) {
                /* A row past the last has weight 0, but must not be read. */
                const uint8_t *one = from + (axis->first[i] + k < rows ? k : 0) * pitch + x;
                const uint8_t *two = from + (axis->first[i] + k + 1 < rows ? k + 1 : 0) * pitch + x;
                int32_t pair;
                memcpy(&pair, axis->weight + i * taps + k, 4);
                __m256i weight = _mm256_set1_epi32(pair);
                __m256i p = _mm256_loadu_si256((const __m256i *)one);
                __m256i q = _mm256_loadu_si256((const __m256i *)two);
                __m256i low = _mm256_unpacklo_epi8(p, q), high = _mm256_unpackhi_epi8(p, q);
                a = _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), weight));
                b = _mm256_add_epi32(b, _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), weight));
                c = _mm256_add_epi32(c, _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), weight));
                d = _mm256_add_epi32(d, _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), weight));
            }
            a = _mm256_packs_epi32(_mm256_sra_epi32(a, shift), _mm256_sra_epi32(b, shift));
            c = _mm256_packs_epi32(_mm256_sra_epi32(c, shift), _mm256_sra_epi32(d, shift));
            _mm256_storeu_si256((__m256i *)(out + i * out_pitch + x), _mm256_packus_epi16(a, c));
        }
    }
    down_plain(axis, in, pitch, rows, bytes & ~31, bytes, out, out_pitch, size);
}
#endif

static void resize(const Axis *across, const Axis *down, const uint8_t *in, int64_t in_pitch,
                   int64_t rows, uint8_t *between, int64_t pitch, uint8_t *out, int64_t size) {
#if defined(__x86_64__) && !defined(PLAIN)
    if (__builtin_cpu_supports("avx2")) {
        across_avx2(across, in, in_pitch, rows, between, pitch, size);
        down_avx2(down, between, pitch, rows, size * CHANNELS, out, size * CHANNELS, size);
        return;
    }
#endif
    across_plain(across, in, in_pitch, rows, between, pitch, size);
    down_plain(down, between, pitch, rows, 0, size * CHANNELS, out, size * CHANNELS, size);
}

/* Batches */

typedef struct {
    Buffer image, between, across, down;
} Scratch;

/* The smallest box that holds all views of a slot (a sample's place in the batch). */
static Box needed(const Batch *batch, int64_t slot) {
    int64_t top = INT64_MAX, left = INT64_MAX, bottom = 0, right = 0;
    for (int64_t c = 0; c < batch->num_crops; c++)
        for (int64_t view = 0; view < batch->crops[c].views; view++) {
            Box box = batch->crops[c].boxes[view * batch->batch + slot];
            top = box.top < top ? box.top : top;
            left = box.left < left ? box.left : left;
            bottom = box.top + box.height > bottom ? box.top + box.height : bottom;
            right = box.left + box.width > right ? box.left + box.width : right;
        }
    return (Box){top, left, bottom - top, right - left};
}

static int crop(const Batch *batch, int64_t slot, const uint8_t *image, int64_t pitch,
                Scratch *scratch) {
    for (int64_t c = 0; c < batch->num_crops; c++) {
        const CropSpec *spec = batch->crops + c;
        int64_t size = spec->size, row = size * CHANNELS + 32;
        for (int64_t view = 0; view < spec->views; view++) {
            Box box = spec->boxes[view * batch->batch + slot];
            Axis across, down;
            if (plan(&across, &scratch->across, box.width, size) ||
                plan(&down, &scratch->down, box.height, size) ||
                !reserve(&scratch->between, box.height * row))
                return -1;
            resize(&across, &down, image + box.top * pitch + box.left * CHANNELS, pitch, box.height,
                   scratch->between.bytes, row,
                   spec->out + (view * batch->batch + slot) * size * size * CHANNELS, size);
        }
    }
    return 0;
}

static int one(Batch *batch, int64_t slot, Decoder *decoder, Scratch *scratch) {
    int64_t position = batch->positions[slot];
    int64_t height = batch->height[position], width = batch->width[position];
    const uint8_t *stored = batch->data + batch->pointer[position];
    Box box = needed(batch, slot);
    uint8_t *padded = batch->padded + slot * batch->rows * batch->columns * CHANNELS;
    int64_t pitch = (batch->padded ? batch->columns : width) * CHANNELS;
    if (batch->mode[position] == RAW) {
        if (!batch->padded) return crop(batch, slot, stored, pitch, scratch);
        for (int64_t row = 0; row < height; row++)
            memcpy(padded + row * pitch, stored + row * width * CHANNELS, width * CHANNELS);
        return 0;
    }
    uint8_t *image = batch->padded ? padded : reserve(&scratch->image, height * pitch);
    if (!image) return -1;
    if (decode(decoder, stored, batch->length[position], height, width, box, image, pitch))
        return -1;
    return batch->padded ? 0 : crop(batch, slot, image, pitch, scratch);
}

static void advise(const uint8_t *from, int64_t bytes, int advice) {
    uintptr_t start = (uintptr_t)from & ~((uintptr_t)sysconf(_SC_PAGESIZE) - 1);
    madvise((void *)start, (uintptr_t)from + bytes - start, advice);  /* a hint, which may fail */
}

/* Disable read-ahead: a page fault reads that page alone. */
void fastproj_read_at_random(const uint8_t *data, int64_t bytes) {
    advise(data, bytes, MADV_RANDOM);
}

/* Start reading the samples of a batch. */
void fastproj_prefetch(const Batch *batch) {
    for (int64_t slot = 0; slot < batch->batch; slot++) {
        int64_t position = batch->positions[slot];
        advise(batch->data + batch->pointer[position], batch->length[position], MADV_WILLNEED);
    }
}

/* Bus errors: a read of the mapped file past its new end, where it was cut, or a disk that fails.
 * A thread that fills a batch then leaves the sample; elsewhere the process ends as it would have,
 * but with a line that says why. */
static __thread __attribute__((tls_model("initial-exec"))) sigjmp_buf *filling;
static struct sigaction before;

static void on_bus_error(int number, siginfo_t *info, void *context) {
    static const char line[] =
        "error: a file that is mapped into memory was cut, its disk or network failed, or "
        "/dev/shm is full\n";
    if (filling) siglongjmp(*filling, 1);
    if (before.sa_handler == SIG_DFL && write(STDERR_FILENO, line, sizeof(line) - 1) < 0) _exit(1);
    sigaction(SIGBUS, &before, NULL);  /* the access is repeated, and meets what was there before */
}

void fastproj_catch_bus_errors(void) {
    struct sigaction ours = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO};
    sigaction(SIGBUS, &ours, &before);
}

/* Not inlined: after siglongjmp only what lies in memory has its value. */
__attribute__((noinline)) static int fill(Batch *batch, Decoder *decoder, Scratch *scratch,
                                          int64_t *slot) {
    while ((*slot = __atomic_fetch_add(&batch->next, 1, __ATOMIC_RELAXED)) < batch->batch)
        if (one(batch, *slot, decoder, scratch)) return -1;
    return 0;
}

/* Fills slots until none is left. Returns -1, or the slot that failed with the reason in `error`. */
int64_t fastproj_fill(Batch *batch, char error[MESSAGE_BYTES]) {
    Decoder decoder;
    Scratch scratch = {0};
    sigjmp_buf escape;
    int64_t slot = 0, failed = -1;
    strcpy(error, "out of memory");
    if (open_decoder(&decoder, error)) return 0;
    if (sigsetjmp(escape, 1)) {
        strcpy(error, "the file was cut while it was read, or its disk or network failed");
        failed = slot;
    } else {
        filling = &escape;
        if (fill(batch, &decoder, &scratch, &slot)) failed = slot;
    }
    filling = NULL;
    close_decoder(&decoder);
    free(scratch.image.bytes);
    free(scratch.between.bytes);
    free(scratch.across.bytes);
    free(scratch.down.bytes);
    return failed;
}
