/* The nearest rows of each query, from similarities that a matrix product gave. nearest.py declares
 * the same struct; the tests compare this file with a stable sort.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define BLOCK 32 /* rows that are looked at together: few of some thousand blocks hold a near one */
#define LANES 16
typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* Older compilers do not dispatch by the names of processors' levels. */
#if defined(__x86_64__) && defined(__linux__) && (__GNUC__ >= 12 || __clang_major__ >= 18)
#define FOR_EACH_PROCESSOR \
    __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const uint16_t *rough; /* (queries, rows) bfloat16; NULL: exact ones are given */
    const int32_t *exact;  /* (queries, rows), the bits of floats */
    const float *query;    /* (queries, width), and */
    const float *bank;     /* (rows, width): what exact similarities of rough ones are made of */
    int64_t queries, rows, width;
    int64_t some;    /* so many of the rough ones get an exact one, at least k */
    int64_t k;
    float *near;     /* (queries, k), the nearest first; of equals the first rows */
    int64_t *row;    /* (queries, k) */
    float *others;   /* (queries): no rough similarity of others is above that */
    int64_t next;    /* the first query that no thread has taken */
} Search;

typedef struct {
    float value;
    int64_t row;
} Found;

/* Whether a is farther than b; of equals, the later row. */
INLINE int farther(Found a, Found b) {
    return a.value < b.value || (a.value == b.value && a.row > b.row);
}

/* Reorder ``found`` so that the k nearest come first, in any order (Hoare's quickselect). */
INLINE void keep(Found *found, int64_t count, int64_t k) {
    for (int64_t low = 0, high = count - 1; low < high;) {
        Found pivot = found[(low + high) / 2];
        int64_t i = low, j = high;
        while (i <= j) {
            while (farther(pivot, found[i])) i++;
            while (farther(found[j], pivot)) j--;
            if (i > j) break;
            Found one = found[i];
            found[i++] = found[j];
            found[j--] = one;
        }
        if (k - 1 <= j) high = j;
        else if (k - 1 >= i) low = i;
        else break;
    }
}

/* A float's bits as an integer of the same order, and back: the compiler takes maxima of integers
 * together, not those of floats. */
INLINE int32_t ordered(int32_t bits) { return bits ^ (int32_t)((uint32_t)(bits >> 31) >> 1); }

INLINE int32_t bits_at(const uint16_t *rough, const int32_t *exact, int64_t i) {
    return rough ? (int32_t)((uint32_t)rough[i] << 16) : exact[i];
}

INLINE float as_float(int32_t bits) {
    union { int32_t bits; float value; } number = {bits};
    return number.value;
}

/* Puts the ``count`` nearest of a query first into ``found``, which holds one for each row.
 *
 * As many blocks of rows have a maximum that is no farther than the count-th nearest maximum, so
 * that what is farther is none of them. ``maxima`` holds one for each block. */
INLINE void search(
    const Search *s, int64_t query, int64_t count, Found *restrict found, float *restrict maxima
) {
    const uint16_t *rough = s->rough;
    const int32_t *exact = s->exact;
    int64_t at = query * s->rows, rows = s->rows, whole = rows / BLOCK, blocks = 0;
    for (; blocks < whole; blocks++) {
        int32_t most = INT32_MIN;
        for (int64_t i = 0; i < BLOCK; i++) {
            int32_t value = ordered(bits_at(rough, exact, at + blocks * BLOCK + i));
            most = value > most ? value : most;
        }
        maxima[blocks] = as_float(ordered(most));
    }
    if (whole * BLOCK < rows) maxima[blocks++] = INFINITY; /* of the last ones, unknown */
    float least = -INFINITY;
    if (whole > count) {
        for (int64_t block = 0; block < whole; block++) found[block] = (Found){maxima[block], block};
        keep(found, whole, count);
        least = found[0].value;
        for (int64_t i = 1; i < count; i++) least = found[i].value < least ? found[i].value : least;
    }
    int64_t some = 0;
    for (int64_t block = 0; block < blocks; block++) {
        if (maxima[block] < least) continue;
        int64_t end = block < whole ? (block + 1) * BLOCK : rows;
        for (int64_t i = block * BLOCK; i < end; i++) {
            float value = as_float(bits_at(rough, exact, at + i));
            if (!(value < least)) found[some++] = (Found){value, i}; /* a NaN too: at least count */
        }
    }
    keep(found, some, count);
}

static int by_distance(const void *a, const void *b) {
    return farther(*(const Found *)a, *(const Found *)b) ? 1 : -1;
}

/* Sums in the same order on every processor, some of which round a product and its sum at once. */
INLINE float product(const float *restrict a, const float *restrict b, int64_t width) {
    Vector sums = {0};
    float rest = 0;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) sums += *(const Vector *)(a + i) * *(const Vector *)(b + i);
    for (; i < width; i++) rest += a[i] * b[i];
    for (i = 0; i < LANES; i++) rest += sums[i];
    return rest;
}

FOR_EACH_PROCESSOR
static void nearest(const Search *s, int64_t query, Found *found, float *maxima) {
    int64_t count = s->rough ? s->some : s->k;
    search(s, query, count, found, maxima);
    if (s->rough) {
        float least = found[0].value;
        for (int64_t i = 0; i < count; i++) {
            const float *one = s->query + query * s->width;
            least = found[i].value < least ? found[i].value : least;
            found[i].value = product(one, s->bank + found[i].row * s->width, s->width);
        }
        s->others[query] = least;
        keep(found, count, s->k);
    }
    qsort(found, (size_t)s->k, sizeof *found, by_distance);
    for (int64_t i = 0; i < s->k; i++) {
        s->near[query * s->k + i] = found[i].value;
        s->row[query * s->k + i] = found[i].row;
    }
}

/* Takes queries until none is left, beside other threads. 1 where memory runs out, else 0. */
int fastproj_nearest(Search *s) {
    Found *found = malloc((size_t)s->rows * sizeof *found);
    float *maxima = malloc((size_t)(s->rows / BLOCK + 1) * sizeof *maxima);
    while (found && maxima) {
        int64_t query = __atomic_fetch_add(&s->next, 1, __ATOMIC_RELAXED);
        if (query >= s->queries) break;
        nearest(s, query, found, maxima);
    }
    free(found);
    free(maxima);
    return !found || !maxima;
}
