/* Products of runs of float32 rows with the plain matrices of many experts in one call, and SiLU gates.

       times : y[r] = x[row[r]] W_e                 for the expert e that row r is sorted under
       outer : D_e  = sum_r a[row[r]] b[row[r]]^T   over its rows

   Both are C = A B with a register tile of ROWS x COLUMNS sums. B is brought into panels [k, COLUMNS] and A into rows
   of one constant stride (times) or columns of ROWS (outer), in parts that stay in the second cache; rows are gathered
   on the way. One task is a block of columns of one expert, so that no sum is split between threads and their number
   does not change a bit of the result.

   Vectors are the compiler's own; intrinsics serve only to transpose. All arguments were checked by the caller. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__AVX512F__)
#include <immintrin.h>
enum { LANES = 16, ROWS = 14 };
#elif defined(__AVX2__)
enum { LANES = 8, ROWS = 6 };
#else
enum { LANES = 4, ROWS = 6 };
#endif

#define INLINE static inline __attribute__((always_inline))

enum {
    COLUMNS = 2 * LANES,
    DEPTH = 512,         /* of a part of the sum: a panel of 64 KB */
    STRIDE = DEPTH + 16, /* of rows of A: not a power of two, or all rows of a tile would meet in one set of the cache */
    TALL = 18 * ROWS,    /* rows of a part of A, 600 KB; as columns they lie 16 apart */
    TASK = 16 * COLUMNS  /* columns of a task */
};

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE Vector load(const float *from) { return *(const Anywhere *)from; }
INLINE void store(float *to, Vector value) { *(Anywhere *)to = value; }

typedef struct {
    const float *a, *b; /* A: rows x or a; B: matrices or rows b */
    const int64_t *a_row, *b_row;
    int64_t a_stride, b_stride; /* of rows */
    int64_t b_expert, b_k, b_column; /* times: strides of the matrices, one of the latter two is 1 */
    float *out;
    int64_t out_expert, out_stride;
    int64_t experts;
    const int64_t *count;
    int64_t height, width, depth; /* of C, and of the sum; the rows of an expert stand for height or for depth */
    int64_t outer, threads;
} Product;

typedef struct {
    float *a, *b;
} Scratch;

static _Thread_local Scratch mine; /* kept: fresh memory costs a page fault every 4 KB */

static int scratch(void) {
    if (!mine.a) {
        size_t a = sizeof(float) * (TALL / ROWS * 16 * STRIDE), b = sizeof(float) * DEPTH * COLUMNS;
        mine.a = aligned_alloc(64, (a + b + 63) / 64 * 64);
        mine.b = mine.a ? (float *)((char *)mine.a + a) : NULL;
    }
    return mine.a != NULL;
}

/* ROWS x COLUMNS sums over the depth of a part. A is at a[i * row + k * step]. */
INLINE void tile(const int rows, const int vectors, const float *a, const int row, const int step, const float *b,
                 int64_t depth, float *out, int64_t out_stride, int64_t width, int more) {
    Vector sum[ROWS][2];
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vectors; v++) sum[i][v] = (Vector){0};
    for (int64_t k = 0; k < depth; k++, a += step, b += COLUMNS) {
        Vector right[2];
        for (int v = 0; v < vectors; v++) right[v] = load(b + v * LANES);
        for (int i = 0; i < rows; i++)
            for (int v = 0; v < vectors; v++) sum[i][v] += a[i * row] * right[v];
    }
    for (int i = 0; i < rows; i++, out += out_stride) {
        if (width == vectors * LANES) {
            for (int v = 0; v < vectors; v++)
                store(out + v * LANES, more ? load(out + v * LANES) + sum[i][v] : sum[i][v]);
        } else {
            float part[COLUMNS];
            for (int v = 0; v < vectors; v++) store(part + v * LANES, sum[i][v]);
            for (int64_t j = 0; j < width; j++) out[j] = more ? out[j] + part[j] : part[j];
        }
    }
}

INLINE void tiles(const int rows, const int row, const int step, const float *a, const float *b, int64_t depth,
                  float *out, int64_t out_stride, int64_t width, int more) {
    if (width > LANES) tile(rows, 2, a, row, step, b, depth, out, out_stride, width, more);
    else tile(rows, 1, a, row, step, b, depth, out, out_stride, width, more);
}

#define CASE(n) \
    case n: tiles(n <= ROWS ? n : ROWS, row, step, a, b, depth, out, out_stride, width, more); break;

INLINE void any_tile(int64_t rows, const int row, const int step, const float *a, const float *b, int64_t depth,
                     float *out, int64_t out_stride, int64_t width, int more) {
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13)
        CASE(14)
    }
}

static __attribute__((noinline)) void tile_of_rows(int64_t rows, const float *a, const float *b, int64_t depth,
                                                   float *out, int64_t out_stride, int64_t width, int more) {
    any_tile(rows, STRIDE, 1, a, b, depth, out, out_stride, width, more);
}

static __attribute__((noinline)) void tile_of_columns(int64_t rows, const float *a, const float *b, int64_t depth,
                                                      float *out, int64_t out_stride, int64_t width, int more) {
    any_tile(rows, 1, 16, a, b, depth, out, out_stride, width, more);
}

/* A panel [depth, COLUMNS] from a matrix whose columns are apart by `stride` and contiguous along k. */
static void turned(const float *from, int64_t stride, int64_t depth, int64_t width, float *to) {
    int64_t k0 = 0;
#if defined(__AVX512F__)
    for (int64_t half = 0; half < 2; half++)
        for (k0 = 0; k0 + 16 <= depth; k0 += 16) {
            const float *column[16];
            for (int64_t j = 0; j < 16; j++) { /* columns that are not there are any others: nobody reads them */
                int64_t c = half * 16 + j;
                column[j] = from + (c < width ? c : width - 1) * stride + k0;
            }
            for (int q = 0; q < 16; q += 4) {
                __m512 z[4];
                for (int p = 0; p < 4; p++) {
                    z[p] = _mm512_castps128_ps512(_mm_loadu_ps(column[p] + q));
                    z[p] = _mm512_insertf32x4(z[p], _mm_loadu_ps(column[p + 4] + q), 1);
                    z[p] = _mm512_insertf32x4(z[p], _mm_loadu_ps(column[p + 8] + q), 2);
                    z[p] = _mm512_insertf32x4(z[p], _mm_loadu_ps(column[p + 12] + q), 3);
                }
                __m512d lo0 = _mm512_castps_pd(_mm512_unpacklo_ps(z[0], z[1]));
                __m512d lo1 = _mm512_castps_pd(_mm512_unpacklo_ps(z[2], z[3]));
                __m512d hi0 = _mm512_castps_pd(_mm512_unpackhi_ps(z[0], z[1]));
                __m512d hi1 = _mm512_castps_pd(_mm512_unpackhi_ps(z[2], z[3]));
                float *at = to + (k0 + q) * COLUMNS + half * 16;
                _mm512_storeu_pd((double *)at, _mm512_unpacklo_pd(lo0, lo1));
                _mm512_storeu_pd((double *)(at + COLUMNS), _mm512_unpackhi_pd(lo0, lo1));
                _mm512_storeu_pd((double *)(at + 2 * COLUMNS), _mm512_unpacklo_pd(hi0, hi1));
                _mm512_storeu_pd((double *)(at + 3 * COLUMNS), _mm512_unpackhi_pd(hi0, hi1));
            }
        }
#endif
    for (int64_t k = k0; k < depth; k++)
        for (int64_t j = 0; j < COLUMNS; j++) to[k * COLUMNS + j] = j < width ? from[j * stride + k] : 0;
}

/* A panel [depth, COLUMNS] from rows. */
INLINE void straight(const float *from, int64_t stride, const int64_t *row, int64_t depth, int64_t width, float *to) {
    for (int64_t k = 0; k < depth; k++, to += COLUMNS) {
        const float *source = from + (row ? row[k] : k) * stride;
        if (width == COLUMNS) {
            store(to, load(source));
            store(to + LANES, load(source + LANES));
        } else {
            for (int64_t j = 0; j < COLUMNS; j++) to[j] = j < width ? source[j] : 0;
        }
    }
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Ask for a share of the lines that a panel at column j will be made of, while products run. */
INLINE void ahead(const Product *p, const float *b, const int64_t *row, int64_t depth, int64_t width, int64_t part,
                  int64_t parts) {
    if (p->outer || p->b_column == 1) {
        int64_t stride = p->outer ? p->b_stride : p->b_k;
        for (int64_t k = depth * part / parts; k < depth * (part + 1) / parts; k++) {
            const float *line = b + (row ? row[k] : k) * stride;
            for (int64_t i = 0; i < width; i += 16) __builtin_prefetch(line + i, 0, 2);
        }
    } else {
        for (int64_t j = width * part / parts; j < width * (part + 1) / parts; j++)
            for (int64_t k = 0; k < depth; k += 16) __builtin_prefetch(b + j * p->b_column + k, 0, 2);
    }
}

/* One block of columns of one expert. `first` is its first row. */
static void block(const Product *p, int64_t expert, int64_t first, int64_t from, int64_t to) {
    int64_t rows = p->count[expert], height = p->outer ? p->height : rows, depth = p->outer ? rows : p->depth;
    for (int64_t k0 = 0; k0 < depth; k0 += DEPTH) {
        int64_t deep = least(DEPTH, depth - k0);
        for (int64_t i0 = 0; i0 < height; i0 += TALL) {
            int64_t tall = least(TALL, height - i0);
            int64_t steps = (tall + ROWS - 1) / ROWS, step = (tall + steps - 1) / steps; /* no narrow last tile */
            if (p->outer) {
                for (int64_t k = 0; k < deep; k++) {
                    int64_t r = first + k0 + k;
                    const float *source = p->a + (p->a_row ? p->a_row[r] : r) * p->a_stride + i0;
                    float *to_tile = mine.a + k * 16;
                    for (int64_t i = 0; i < tall; i += step, to_tile += deep * 16) {
                        if (i0 + i + 16 <= height) memcpy(to_tile, source + i, 4 * 16); /* more than needed: no call */
                        else memcpy(to_tile, source + i, 4 * least(step, tall - i));
                    }
                }
            } else {
                for (int64_t i = 0; i < tall; i++) {
                    int64_t r = first + i0 + i;
                    const float *source = p->a + (p->a_row ? p->a_row[r] : r) * p->a_stride + k0;
                    memcpy(mine.a + i * STRIDE, source, 4 * deep);
                }
            }
            for (int64_t j = from; j < to; j += COLUMNS) {
                int64_t width = least(COLUMNS, to - j), next = least(COLUMNS, to - j - width);
                const int64_t *row = p->outer && p->b_row ? p->b_row + first + k0 : NULL;
                const float *b = p->b + expert * p->b_expert + k0 * p->b_k + j * p->b_column;
                if (p->outer) b = p->b + (row ? 0 : (first + k0) * p->b_stride) + j;
                if (p->outer) straight(b, p->b_stride, row, deep, width, mine.b);
                else if (p->b_column == 1) straight(b, p->b_k, NULL, deep, width, mine.b);
                else turned(b, p->b_column, deep, width, mine.b);
                b += width * (p->outer ? 1 : p->b_column);
                for (int64_t i = 0, t = 0; i < tall; i += step, t++) {
                    int64_t height_here = least(step, tall - i), more = k0 > 0;
                    if (next > 0) ahead(p, b, row, deep, next, t, steps);
                    if (p->outer) {
                        float *out = p->out + expert * p->out_expert + (i0 + i) * p->out_stride + j;
                        tile_of_columns(height_here, mine.a + t * deep * 16, mine.b, deep, out, p->out_stride, width, more);
                    } else {
                        float *out = p->out + (first + i0 + i) * p->out_stride + j;
                        tile_of_rows(height_here, mine.a + i * STRIDE, mine.b, deep, out, p->out_stride, width, more);
                    }
                }
            }
        }
    }
}

/* 0, or 1 where there was no memory. */
int coterie_product(const Product *p) {
    int64_t blocks = (p->width + TASK - 1) / TASK, failed = 0;
    int64_t *first = malloc(sizeof(int64_t) * (p->experts + 1));
    if (!first) return 1;
    first[0] = 0;
    for (int64_t e = 0; e < p->experts; e++) first[e + 1] = first[e] + p->count[e];
#pragma omp parallel for schedule(dynamic) num_threads(p->threads) reduction(| : failed)
    for (int64_t task = 0; task < p->experts * blocks; task++) {
        int64_t e = task / blocks, from = task % blocks * TASK, to = least(from + TASK, p->width);
        if (!p->count[e]) {
            if (p->outer)
                for (int64_t i = 0; i < p->height; i++)
                    memset(p->out + e * p->out_expert + i * p->out_stride + from, 0, 4 * (to - from));
        } else if (scratch()) block(p, e, first[e], from, to);
        else failed = 1;
    }
    free(first);
    return (int)failed;
}

typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

INLINE Vector chosen(Integers which, Vector yes, Vector no) {
    return (Vector)((which & (Integers)yes) | (~which & (Integers)no));
}

/* exp(x) to about one unit in the last place, for x <= 0: 2^n exp(f) with f within half of log 2 around 0. */
INLINE Vector exponential(Vector x) {
    x = chosen(x < -87.0f, (Vector){0} - 87.0f, x);
    Integers n = __builtin_convertvector(x * 1.44269504f - 0.5f, Integers);
    Vector whole = __builtin_convertvector(n, Vector), f = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Vector y = f * 1.9875691500e-4f + 1.3981999507e-3f; /* the polynomial of Cephes' expf */
    y = y * f + 8.3334519073e-3f;
    y = y * f + 4.1665795894e-2f;
    y = y * f + 1.6666665459e-1f;
    y = y * f + 5.0000001201e-1f;
    y = y * f * f + f + 1.0f;
    return y * (Vector)((n + 127) << 23);
}

INLINE Vector sigmoid(Vector x) {
    Vector e = exponential((Vector)((Integers)x | INT32_MIN)), s = 1.0f / (1.0f + e);
    return chosen(x < 0.0f, e * s, s);
}

typedef struct {
    const float *gate, *up, *grad;
    float *grad_gate, *grad_up, *out;
} Row;

/* LANES numbers of a row at i. */
INLINE void gate(Row row, int64_t i, float factor) {
    Vector g = load(row.gate + i);
    store(row.out + i, g * sigmoid(g) * load(row.up + i) * factor);
}

INLINE Vector gate_backward(Row row, int64_t i, float factor) {
    Vector g = load(row.gate + i), u = load(row.up + i), d = load(row.grad + i), s = sigmoid(g);
    Vector silu = g * s, inner = silu * u, scaled = d * factor;
    store(row.out + i, inner * factor);
    store(row.grad_up + i, scaled * silu);
    store(row.grad_gate + i, scaled * u * (s + silu * (1.0f - s)));
    return d * inner;
}

/* out = silu(gate) * up * factor */
void coterie_silu_gate(const float *up, const float *factor, float *out, int64_t rows, int64_t width, int64_t threads) {
    int64_t even = width - width % LANES, rest = 4 * (width - even);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        Row row = {.gate = up + 2 * r * width, .up = up + (2 * r + 1) * width, .out = out + r * width};
        for (int64_t i = 0; i < even; i += LANES) gate(row, i, factor[r]);
        if (rest) {
            float part[3][LANES] = {0};
            memcpy(part[0], row.gate + even, rest);
            memcpy(part[1], row.up + even, rest);
            gate((Row){.gate = part[0], .up = part[1], .out = part[2]}, 0, factor[r]);
            memcpy(row.out + even, part[2], rest);
        }
    }
}

/* From the gradient of out: those of gate and up, of the factor, and out once more. */
void coterie_silu_gate_backward(const float *up, const float *factor, const float *grad, float *grad_up, float *out,
                                float *grad_factor, int64_t rows, int64_t width, int64_t threads) {
    int64_t even = width - width % LANES, rest = 4 * (width - even);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        int64_t at = r * width;
        Row row = {up + 2 * at, up + 2 * at + width, grad + at, grad_up + 2 * at, grad_up + 2 * at + width, out + at};
        Vector sum = {0};
        for (int64_t i = 0; i < even; i += LANES) sum += gate_backward(row, i, factor[r]);
        if (rest) {
            float part[6][LANES] = {0};
            memcpy(part[0], row.gate + even, rest);
            memcpy(part[1], row.up + even, rest);
            memcpy(part[2], row.grad + even, rest);
            sum += gate_backward((Row){part[0], part[1], part[2], part[3], part[4], part[5]}, 0, factor[r]);
            memcpy(row.grad_gate + even, part[3], rest);
            memcpy(row.grad_up + even, part[4], rest);
            memcpy(row.out + even, part[5], rest);
        }
        float total = 0;
        for (int l = 0; l < LANES; l++) total += sum[l];
        grad_factor[r] = total;
    }
}
