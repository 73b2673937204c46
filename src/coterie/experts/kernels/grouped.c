/* Products with the packed matrices of many experts, each of its own width, in one call.

   Rows of x are sorted by expert. For every expert with rows, and every block of its outputs, one task

       y[r, o] = sum_i x[r, i] W[o, i]        W = (q - zero) * scale in float32, as in coterie.experts.packing

   Weights are rounded as torch rounds them; only the order of the sum differs, and in pairs (below) where zeros and
   scales enter it. Activations are not quantized. No sum is split between threads, so that their number does not change
   a bit of the result.

   Two ways through a task. With few rows a weight lives in a register and meets each row there: time is reading codes.
   With many, a tile of weights is unpacked once into the cache and a register-tiled product runs over it.

   With AVX-512 and VBMI, 64 codes of b bits are 8b bytes: one permute gives each 64-bit lane the b bytes of its eight
   codes, one multi-shift makes them eight bytes, and codes of up to four bits become numbers by looking them up in a
   register that holds the group's 16 weights. Element 16 k + l of such a block is column 4 l + k, and x is put in the
   same order beforehand. Elsewhere the compiler vectorises plain loops.

   With AVX-512 BF16, few bfloat16 rows meet codes of two to four bits themselves: these are exact in bfloat16, 32 pairs
   are multiplied at a time, and scale and zero of a group meet its sum.

   It knows neither routers nor activations; all arguments were checked by its caller. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VBMI__)
#define WIDE 1
#include <immintrin.h>
#else
#define WIDE 0
#endif

#if WIDE && defined(__AVX512BF16__)
#define PAIRS 1
#else
#define PAIRS 0
#endif

#define INLINE static inline __attribute__((always_inline))

enum { FLOAT32, FLOAT16, BFLOAT16 };
enum { PLAIN = 16 };

enum {
    BLOCK = 64,         /* columns that are unpacked together */
    CHUNK = 16,         /* blocks of a tile: 1024 columns */
    AHEAD = 4096,         /* bytes of weights that are asked for before they are needed: streams end at pages */
    TILE_OUTPUTS = 40,    /* outputs of a task; with CHUNK a tile of 160 KB, which fits the second cache */
    WIDTH = WIDE ? 5 : 4, /* outputs of the register tile: 5 x 5 sums leave just enough of 32 registers */
    ROWS = WIDE ? 5 : 2   /* rows of the register tile, at most */
};

typedef struct {
    const void *x; /* [R, inputs], rows x_stride elements apart */
    int64_t x_kind, x_stride;
    const int64_t *row; /* where each sorted row lies in x, or NULL for in order */
    float *y;           /* element (r, o) at r * y_row + o * y_column */
    int64_t y_row, y_column;
    int64_t experts;
    const int64_t *count; /* rows of each expert */
    const int64_t *bits, *start, *rank;
    int64_t outputs, inputs, group;
    const uint32_t *words;
    int64_t total_words;
    const void *scale, *zero; /* zero is NULL on a symmetric grid */
    int64_t scale_kind;
    const void *plain;
    int64_t plain_kind, threads;
} Job;

/* One expert's matrix, and its rows. */
typedef struct {
    const Job *job;
    int64_t bits, row_words, groups, blocks, rank, rows, first;
    const uint32_t *words;
    const float *x;     /* [rows, blocks * BLOCK], in the order in which weights are unpacked */
    const int32_t *lane_group; /* group of every column in that order; only for groups that cut through a lane */
    char *pairs; /* the rows of x as pairs, or NULL */
} Matrix;

INLINE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE float from_half(uint16_t half) {
    uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13, sign = (uint32_t)(half & 0x8000) << 16;
    float scaled = from_bits(magnitude) * 0x1p112f; /* moves the exponent; exact, subnormal numbers included */
    uint32_t bits;
    memcpy(&bits, &scaled, 4);
    if (magnitude >= 0x0f800000) bits = magnitude | 0x7f800000; /* infinite, or not a number */
    return from_bits(bits | sign);
}

INLINE float element(const void *from, int64_t kind, int64_t i) {
    if (kind == FLOAT32) return ((const float *)from)[i];
    if (kind == BFLOAT16) return from_bits((uint32_t)((const uint16_t *)from)[i] << 16);
    return from_half(((const uint16_t *)from)[i]);
}

INLINE void widen_as(const void *from, const int64_t kind, int64_t first, int64_t count, float *to) {
    for (int64_t i = 0; i < count; i++) to[i] = element(from, kind, first + i);
}

static void widen(const void *from, int64_t kind, int64_t first, int64_t count, float *to) {
    if (kind == FLOAT32) memcpy(to, (const float *)from + first, 4 * count);
    else if (kind == BFLOAT16) widen_as(from, BFLOAT16, first, count, to);
    else widen_as(from, FLOAT16, first, count, to);
}

/* What a thread has for a task: a tile of weights, and the scales and zeros of the task's outputs [outputs, groups]. */
typedef struct {
    float *tile, *scale, *zero;
    char *row; /* a copy of the last output's codes, behind which there is something to read */
} Scratch;

/* Scales and zeros of some outputs, in float32. */
static void grids(const Matrix *m, int64_t from, int64_t to, const Scratch *mine) {
    const Job *job = m->job;
    if (m->bits == PLAIN) return;
    int64_t first = (m->rank * job->outputs + from) * m->groups, count = (to - from) * m->groups;
    widen(job->scale, job->scale_kind, first, count, mine->scale);
    if (job->zero) widen(job->zero, job->scale_kind, first, count, mine->zero);
    else {
        float middle = m->bits == 1 ? 0.5f : (float)(1 << (m->bits - 1));
        for (int64_t i = 0; i < count; i++) mine->zero[i] = middle;
    }
}

#if WIDE

#if PAIRS

/* Pairs: a vector of 32 words holds `per_word` codes each, and column per_word * w + p of its columns is code p of word
   w. Two words make a lane of sums, so that a group has lanes of its own. */
INLINE int64_t per_word_of(const int64_t bits) { return bits > 2 ? 4 : 8; }

/* Whether these products are taken from pairs. Only bfloat16 rows are: as a sum of two or three such numbers, others
   gained little (one float16 row) or took longer than by looking weights up. Over fewer columns the rounding of zero * x could show. */
static int by_pairs(const Job *job, int64_t bits, int64_t rows) {
    int64_t per_word = per_word_of(bits), columns = 32 * per_word, group = job->group;
    if (job->x_kind != BFLOAT16 || rows > 4 || job->inputs < 2 * BLOCK) return 0;
    if (bits < 2 || bits > 4) return 0; /* 8 bits gained nothing */
    return group >= job->inputs || group % columns == 0 || (columns % group == 0 && group % (2 * per_word) == 0);
}

/* Bytes of a row of x by pairs: its vectors, and behind them the sum of each group. */
static int64_t pair_bytes(const Job *job, int64_t bits) {
    int64_t columns = 32 * per_word_of(bits), vectors = (job->inputs + columns - 1) / columns;
    int64_t groups = (job->inputs + job->group - 1) / job->group;
    return 2 * vectors * columns + (4 * groups + 63) / 64 * 64;
}

/* A row of x as vectors [vectors, per_word] of 32 bfloat16 numbers and sums [groups] of float32. Returns whether all
   can be multiplied by 0 and have sums. */
static int arrange_pairs(const Job *job, int64_t bits, const float *straight, char *to) {
    int64_t per_word = per_word_of(bits), columns = 32 * per_word;
    __m512i lane = _mm512_mullo_epi32(_mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
                                      _mm512_set1_epi32((int)per_word));
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
    __mmask16 small = 0xffff;
    for (int64_t i = 0; i < job->inputs; i += columns)
        for (int64_t p = 0; p < per_word; p++) {
            __m512i first = _mm512_add_epi32(lane, _mm512_set1_epi32((int)(i + p)));
            __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32((int)per_word));
            __m512i end = _mm512_set1_epi32((int)job->inputs);
            __m512 none = _mm512_setzero_ps();
            __m512 a = _mm512_mask_i32gather_ps(none, _mm512_cmplt_epi32_mask(first, end), first, straight, 4);
            __m512 b = _mm512_mask_i32gather_ps(none, _mm512_cmplt_epi32_mask(second, end), second, straight, 4);
            __m512 larger = _mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b));
            small &= _mm512_cmp_ps_mask(larger, _mm512_set1_ps(0x1p100f), _CMP_LT_OQ);
            small &= _mm512_cmp_ps_mask(a, b, _CMP_ORD_Q);
            __m512i high = _mm512_and_si512(_mm512_castps_si512(b), upper);
            _mm512_store_si512(to, _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(a), 16), high));
            to += 64;
        }
    for (int64_t i = 0; i < job->inputs; i += job->group, to += 4) {
        int64_t count = job->inputs - i < job->group ? job->inputs - i : job->group;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < count; k += 16) {
            __mmask16 there = count - k >= 16 ? 0xffff : (__mmask16)((1u << (count - k)) - 1);
            sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(there, straight + i + k));
        }
        float all = _mm512_reduce_add_ps(sum);
        memcpy(to, &all, 4);
    }
    return small == 0xffff;
}

INLINE __m512bh bf16(__m512i v) { return (__m512bh)v; }

#define UNROLL _Pragma("GCC unroll 16")

/* `outputs` outputs from `from` on, for a few rows. */
INLINE void pairs(const Matrix *m, const int64_t bits, const int rows, const int outputs, int64_t from, int64_t begin,
                  const Scratch *mine) {
    const Job *job = m->job;
    const int64_t per_word = per_word_of(bits), columns = 32 * per_word, bytes = columns * bits / 8;
    const int64_t vectors = (job->inputs + columns - 1) / columns, row_bytes = 4 * m->row_words;
    const int64_t size = pair_bytes(job, bits), groups = m->groups, i = from - begin;
    const int64_t in_vector = columns / job->group, step = in_vector ? in_vector : 1;
    const int64_t hold = m->groups == 1 ? vectors : in_vector ? 1 : job->group / columns; /* vectors of one group */
    const float middle = (float)(1 << (bits - 1));
    uint16_t numbers[32]; /* by the five bits from a code's first on: those above the code do not matter */
    for (int k = 0; k < 32; k++) {
        float number = (float)(k & ((1 << bits) - 1)) - middle;
        uint32_t all_bits;
        memcpy(&all_bits, &number, 4), numbers[k] = (uint16_t)(all_bits >> 16);
    }
    const __m512i table = _mm512_loadu_si512(numbers);
    uint8_t spread_of[64], shift_of[64];
    for (int k = 0; k < 64; k++) { /* a 64-bit lane takes four words' bits, a word those of its codes */
        spread_of[k] = (uint8_t)(k / 8 * (per_word * bits / 2) + k % 8);
        shift_of[k] = (uint8_t)(k % 8 / 2 * per_word * bits + (k & 1) * 8);
    }
    const __m512i spread = _mm512_loadu_si512(spread_of), shift = _mm512_loadu_si512(shift_of);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int up = 0; /* lanes of one group are 16 / step */
    while ((16 >> up) > step) up++;
    const __m512i group_of = _mm512_srlv_epi32(lane, _mm512_set1_epi32(up));
    const __mmask64 all = bytes == 64 ? ~0ull : (1ull << bytes) - 1;
    const int64_t rest = row_bytes - (vectors - 1) * bytes;
    const __mmask64 end = rest >= 64 ? ~0ull : (1ull << rest) - 1;
    const char *codes[4];
    const float *scale[4], *zero[4];
    __m512 sum[4][4];
    UNROLL
    for (int o = 0; o < outputs; o++) {
        codes[o] = (const char *)(m->words + (from + o) * m->row_words);
        scale[o] = mine->scale + (i + o) * groups, zero[o] = mine->zero + (i + o) * groups;
        UNROLL
        for (int r = 0; r < rows; r++) sum[r][o] = _mm512_setzero_ps();
    }
    for (int64_t g = 0; g < groups; g += 16) { /* what is between a zero and the middle meets the sums of x */
        __mmask16 there = groups - g >= 16 ? 0xffff : (__mmask16)((1u << (groups - g)) - 1);
        UNROLL
        for (int o = 0; o < outputs; o++) {
            __m512 off = _mm512_sub_ps(_mm512_set1_ps(middle), _mm512_maskz_loadu_ps(there, zero[o] + g));
            off = _mm512_maskz_mul_ps(there, off, _mm512_maskz_loadu_ps(there, scale[o] + g));
            UNROLL
            for (int r = 0; r < rows; r++) {
                const float *of_x = (const float *)(m->pairs + r * size + 2 * vectors * columns);
                sum[r][o] = _mm512_fmadd_ps(off, _mm512_maskz_loadu_ps(there, of_x + g), sum[r][o]);
            }
        }
    }
    const char *x = m->pairs;
    int64_t g = 0, held = hold;
    for (int64_t j = 0; j < vectors; j++) {
        const int last = j + 1 == vectors;
        __m512i q[4];
        __m512 part[4][4];
        UNROLL
        for (int o = 0; o < outputs; o++) {
            _mm_prefetch(codes[o] + j * bytes + AHEAD, _MM_HINT_T0);
            q[o] = _mm512_maskz_loadu_epi8(last ? end : all, codes[o] + j * bytes);
            if (bits == 3) q[o] = _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(spread, q[o]));
            UNROLL
            for (int r = 0; r < rows; r++) part[r][o] = _mm512_setzero_ps();
        }
        UNROLL
        for (int p = 0; p < per_word; p++) {
            __m512i w[4];
            UNROLL
            for (int o = 0; o < outputs; o++)
                w[o] = _mm512_permutexvar_epi16(_mm512_srli_epi16(q[o], (unsigned)(p * bits)), table);
            UNROLL
            for (int r = 0; r < rows; r++) {
                __m512bh of_x = bf16(_mm512_load_si512(x + r * size + 64 * p));
                UNROLL
                for (int o = 0; o < outputs; o++) part[r][o] = _mm512_dpbf16_ps(part[r][o], of_x, bf16(w[o]));
            }
        }
        x += 64 * per_word;
        __m512i which = last ? _mm512_min_epi32(group_of, _mm512_set1_epi32((int)(groups - 1 - g))) : group_of;
        UNROLL
        for (int o = 0; o < outputs; o++) {
            __m512 by = _mm512_permutexvar_ps(which, _mm512_loadu_ps(scale[o] + g));
            UNROLL
            for (int r = 0; r < rows; r++) sum[r][o] = _mm512_fmadd_ps(by, part[r][o], sum[r][o]);
        }
        if (!--held) g += step, held = hold;
    }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int o = 0; o < outputs; o++)
            job->y[(m->first + r) * job->y_row + (from + o) * job->y_column] = _mm512_reduce_add_ps(sum[r][o]);
}

INLINE void pairs_of(const Matrix *m, const int64_t bits, const int rows, int64_t from, int64_t to,
                     const Scratch *mine) {
    const int together = rows > 1 ? 2 : 4; /* as many sums as registers can hold */
    int64_t o = from;
    for (; o + together <= to; o += together) pairs(m, bits, rows, together, o, from, mine);
    for (; o < to; o++) pairs(m, bits, rows, 1, o, from, mine);
}

static void in_pairs(const Matrix *m, int64_t from, int64_t to, const Scratch *mine) {
#define CASE(BITS) \
    case BITS: \
        switch (m->rows) { \
        case 1: pairs_of(m, BITS, 1, from, to, mine); break; \
        case 2: pairs_of(m, BITS, 2, from, to, mine); break; \
        case 3: pairs_of(m, BITS, 3, from, to, mine); break; \
        case 4: pairs_of(m, BITS, 4, from, to, mine); break; \
        } \
        break;
    switch (m->bits) { CASE(2) CASE(3) CASE(4) }
#undef CASE
}

#endif

/* How a group lies in a block, and how codes become numbers. */
enum { LOOKUP_WHOLE, LOOKUP_HALVES, CONVERT_WHOLE, CONVERT_HALVES, CONVERT_ANY, PLAIN32, PLAIN16, PLAINB16, MODES };

static int mode_of(const Matrix *m) {
    int64_t group = m->job->group;
    if (m->bits == PLAIN)
        return m->job->plain_kind == FLOAT32 ? PLAIN32 : m->job->plain_kind == FLOAT16 ? PLAIN16 : PLAINB16;
    if (group % BLOCK == 0 || m->groups == 1) return m->bits <= 4 ? LOOKUP_WHOLE : CONVERT_WHOLE;
    if (group == BLOCK / 2) return m->bits <= 4 ? LOOKUP_HALVES : CONVERT_HALVES;
    return CONVERT_ANY;
}

/* What stays the same over the blocks of one output. */
typedef struct {
    const char *codes; /* the output's first byte */
    int64_t bytes, blocks, ahead, next, after, per_group, left, last_group;
    __mmask64 all;
    __m512i spread, shift, low, second, lane[4];
    __m512 table, iota, group_scale, group_zero;
    const float *scale, *zero;
    const int32_t *lane_group;
} Reader;

INLINE Reader reader_of(const Matrix *m, const int mode, int64_t ahead) {
    Reader s = {0};
    int64_t bits = m->bits;
    s.blocks = m->blocks;
    s.ahead = ahead;
    s.bytes = BLOCK * bits / (mode == PLAIN32 ? 4 : 8);
    s.left = m->job->inputs - (m->blocks - 1) * BLOCK; /* columns of the last block */
    s.lane_group = m->lane_group;
    s.last_group = m->groups - 1;
    if (mode >= PLAIN32) return s;
    uint8_t spread[64], shift[64], second[64], lane[4][64];
    float iota[16];
    for (int i = 0; i < 64; i++) {
        spread[i] = (uint8_t)(i / 8 * bits + i % 8);
        shift[i] = (uint8_t)(i % 8 * bits);
        second[i] = i < 32 ? 0 : 16;
        for (int k = 0; k < 4; k++) lane[k][i] = (uint8_t)(i / 4 * 4 + k);
    }
    for (int i = 0; i < 16; i++) iota[i] = (float)(i & ((1 << bits) - 1)); /* bits above a code do not matter */
    s.spread = _mm512_loadu_si512(spread);
    s.shift = _mm512_loadu_si512(shift);
    s.second = _mm512_loadu_si512(second);
    for (int k = 0; k < 4; k++) s.lane[k] = _mm512_loadu_si512(lane[k]);
    s.low = _mm512_set1_epi8(mode == LOOKUP_HALVES ? 15 : (char)((1 << bits) - 1));
    s.iota = _mm512_loadu_ps(iota);
    s.all = s.bytes == 64 ? ~0ull : (1ull << s.bytes) - 1;
    s.per_group = m->groups == 1 ? m->blocks : m->job->group / BLOCK;
    return s;
}

/* Go to an output, the i-th of its task, and a block. */
INLINE void reader_at(Reader *s, const Matrix *m, const int mode, int64_t output, int64_t i, int64_t block,
                      const Scratch *mine) {
    const Job *job = m->job;
    if (mode >= PLAIN32) {
        int64_t size = mode == PLAIN32 ? 4 : 2;
        s->codes = (const char *)job->plain + (m->rank * job->outputs + output) * job->inputs * size;
        return;
    }
    const uint32_t *words = m->words + output * m->row_words;
    s->codes = (const char *)words;
    if (s->codes + s->blocks * s->bytes > (const char *)(job->words + job->total_words)) {
        memcpy(mine->row, words, 4 * m->row_words); /* whole blocks are read, also where the last words of all lie */
        s->codes = mine->row;
    }
    s->scale = mine->scale + i * m->groups;
    s->zero = mine->zero + i * m->groups;
    int64_t size = job->scale_kind == FLOAT32 ? 4 : 2; /* the grid of the same output of the next task */
    int64_t later = (m->rank * job->outputs + output + TILE_OUTPUTS) * m->groups * size, end = later + m->groups * size;
    for (; later < end; later += 64) {
        _mm_prefetch((const char *)job->scale + later, _MM_HINT_T1);
        if (job->zero) _mm_prefetch((const char *)job->zero + later, _MM_HINT_T1);
    }
    if (mode == LOOKUP_WHOLE || mode == CONVERT_WHOLE) {
        int64_t group = block / s->per_group;
        s->scale += group;
        s->zero += group;
        s->next = block; /* the first block has to make its table */
        s->after = (group + 1) * s->per_group;
    }
}

/* The 64 weights of block j. */
INLINE void weights(Reader *s, const int mode, int64_t j, __m512 w[4]) {
    if (mode >= PLAIN32) {
        const char *later = s->codes + j * s->bytes + s->ahead;
        _mm_prefetch(later, _MM_HINT_T0), _mm_prefetch(later + 64, _MM_HINT_T0);
        if (mode == PLAIN32) _mm_prefetch(later + 128, _MM_HINT_T0), _mm_prefetch(later + 192, _MM_HINT_T0);
        for (int k = 0; k < 4; k++) {
            int64_t left = s->left - 16 * k;
            __mmask16 there = j + 1 < s->blocks || left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
            int64_t at = j * BLOCK + 16 * k;
            if (mode == PLAIN32) w[k] = _mm512_maskz_loadu_ps(there, (const float *)s->codes + at);
            else {
                __m256i half = _mm256_maskz_loadu_epi16(there, (const uint16_t *)s->codes + at);
                w[k] = mode == PLAIN16 ? _mm512_cvtph_ps(half)
                                       : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
            }
        }
        return;
    }
    _mm_prefetch(s->codes + j * s->bytes + s->ahead, _MM_HINT_T0);
    __m512i q = _mm512_maskz_loadu_epi8(s->all, s->codes + j * s->bytes);
    q = _mm512_multishift_epi64_epi8(s->shift, _mm512_permutexvar_epi8(s->spread, q));
    if (mode == LOOKUP_WHOLE) {
        if (j == s->next) {
            s->table = _mm512_mul_ps(_mm512_sub_ps(s->iota, _mm512_set1_ps(*s->zero++)), _mm512_set1_ps(*s->scale++));
            s->next = s->after;
            s->after += s->per_group;
        }
        w[0] = _mm512_permutexvar_ps(q, s->table);
        w[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(q, 8), s->table);
        w[2] = _mm512_permutexvar_ps(_mm512_srli_epi32(q, 16), s->table);
        w[3] = _mm512_permutexvar_ps(_mm512_srli_epi32(q, 24), s->table);
        return;
    }
    if (mode == LOOKUP_HALVES) { /* bit 4 of an index chooses between the tables of both halves */
        int64_t a = 2 * j, b = a < s->last_group ? a + 1 : a;
        __m512 low = _mm512_mul_ps(_mm512_sub_ps(s->iota, _mm512_set1_ps(s->zero[a])), _mm512_set1_ps(s->scale[a]));
        __m512 high = _mm512_mul_ps(_mm512_sub_ps(s->iota, _mm512_set1_ps(s->zero[b])), _mm512_set1_ps(s->scale[b]));
        q = _mm512_ternarylogic_epi64(q, s->low, s->second, 0xea); /* (q & low) | second */
        w[0] = _mm512_permutex2var_ps(low, q, high);
        w[1] = _mm512_permutex2var_ps(low, _mm512_srli_epi32(q, 8), high);
        w[2] = _mm512_permutex2var_ps(low, _mm512_srli_epi32(q, 16), high);
        w[3] = _mm512_permutex2var_ps(low, _mm512_srli_epi32(q, 24), high);
        return;
    }
    q = _mm512_and_si512(q, s->low);
    __m512 scale, zero;
    if (mode == CONVERT_WHOLE) {
        if (j == s->next) {
            s->group_scale = _mm512_set1_ps(*s->scale++), s->group_zero = _mm512_set1_ps(*s->zero++);
            s->next = s->after;
            s->after += s->per_group;
        }
        scale = s->group_scale, zero = s->group_zero;
    } else if (mode == CONVERT_HALVES) {
        int64_t a = 2 * j, b = a < s->last_group ? a + 1 : a;
        scale = _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(s->scale[a]), _mm512_set1_ps(s->scale[b]));
        zero = _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(s->zero[a]), _mm512_set1_ps(s->zero[b]));
    }
    for (int k = 0; k < 4; k++) {
        if (mode == CONVERT_ANY) {
            __m512i at = _mm512_loadu_si512(s->lane_group + j * BLOCK + 16 * k);
            scale = _mm512_i32gather_ps(at, s->scale, 4), zero = _mm512_i32gather_ps(at, s->zero, 4);
        }
        __m512i code = _mm512_maskz_permutexvar_epi8(0x1111111111111111ull, s->lane[k], q);
        w[k] = _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(code), zero), scale);
    }
}

/* Few rows: weights meet them in registers. */
INLINE void few_rows(const Matrix *m, const int mode, const int rows, int64_t from, int64_t to, const Scratch *mine) {
    const Job *job = m->job;
    const int64_t blocks = m->blocks, stride = blocks * BLOCK;
    const float *x = m->x;
    Reader s = reader_of(m, mode, AHEAD);
    for (int64_t o = from; o < to; o++) {
        reader_at(&s, m, mode, o, o - from, 0, mine);
        __m512 sum[4][4], w[4];
        for (int r = 0; r < rows; r++)
            for (int k = 0; k < 4; k++) sum[r][k] = _mm512_setzero_ps();
        for (int64_t j = 0; j < blocks; j++) {
            weights(&s, mode, j, w);
            for (int k = 0; k < 4; k++)
                for (int r = 0; r < rows; r++)
                    sum[r][k] = _mm512_fmadd_ps(w[k], _mm512_load_ps(x + r * stride + j * BLOCK + 16 * k), sum[r][k]);
        }
        for (int r = 0; r < rows; r++)
            job->y[(m->first + r) * job->y_row + o * job->y_column] = _mm512_reduce_add_ps(
                _mm512_add_ps(_mm512_add_ps(sum[r][0], sum[r][1]), _mm512_add_ps(sum[r][2], sum[r][3])));
    }
}

/* Blocks j0 to j1 of some outputs, unpacked: tile [outputs, (j1 - j0) * BLOCK]. */
INLINE void fill_tile(const Matrix *m, const int mode, int64_t from, int64_t to, int64_t j0, int64_t j1,
                      const Scratch *mine) {
    const Job *job = m->job;
    Reader s = reader_of(m, mode, 4 * (job->inputs * m->bits / (mode == PLAIN32 ? 4 : 8))); /* four outputs on */
    float *tile = mine->tile;
    for (int64_t o = from; o < to; o++) {
        reader_at(&s, m, mode, o, o - from, j0, mine);
        for (int64_t j = j0; j < j1; j++, tile += BLOCK) {
            __m512 w[4];
            weights(&s, mode, j, w);
            for (int k = 0; k < 4; k++) _mm512_store_ps(tile + 16 * k, w[k]);
        }
    }
}

/* The sums of four vectors, side by side. */
INLINE __m128 sums(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* out [rows, WIDTH]: products of some rows of x and WIDTH rows of the tile, over `length` columns. */
INLINE void product(const int rows, const float *x, int64_t x_stride, const float *tile, int64_t length,
                    float out[][WIDTH]) {
    __m512 sum[ROWS][WIDTH];
    for (int r = 0; r < rows; r++)
        for (int q = 0; q < WIDTH; q++) sum[r][q] = _mm512_setzero_ps();
    for (int64_t i = 0; i < length; i += 16) {
        __m512 w[WIDTH];
        for (int q = 0; q < WIDTH; q++) w[q] = _mm512_load_ps(tile + q * length + i);
        for (int r = 0; r < rows; r++) {
            __m512 v = _mm512_load_ps(x + r * x_stride + i);
            for (int q = 0; q < WIDTH; q++) sum[r][q] = _mm512_fmadd_ps(v, w[q], sum[r][q]);
        }
    }
    for (int r = 0; r < rows; r++) {
        _mm_storeu_ps(out[r], sums(sum[r][0], sum[r][1], sum[r][2], sum[r][3]));
        out[r][4] = _mm512_reduce_add_ps(sum[r][4]);
    }
}

#define EACH_MODE(CALL) \
    switch (mode_of(m)) { \
    case LOOKUP_WHOLE: CALL(LOOKUP_WHOLE); break; \
    case LOOKUP_HALVES: CALL(LOOKUP_HALVES); break; \
    case CONVERT_WHOLE: CALL(CONVERT_WHOLE); break; \
    case CONVERT_HALVES: CALL(CONVERT_HALVES); break; \
    case CONVERT_ANY: CALL(CONVERT_ANY); break; \
    case PLAIN32: CALL(PLAIN32); break; \
    case PLAIN16: CALL(PLAIN16); break; \
    case PLAINB16: CALL(PLAINB16); break; \
    }

static void unpacked(const Matrix *m, int64_t from, int64_t to, int64_t j0, int64_t j1, const Scratch *mine) {
#define CALL(MODE) fill_tile(m, MODE, from, to, j0, j1, mine)
    EACH_MODE(CALL)
#undef CALL
}

static int in_registers(const Matrix *m, int64_t from, int64_t to, const Scratch *mine) {
#if PAIRS
    if (m->pairs) return in_pairs(m, from, to, mine), 1;
#endif
#define CALL(MODE) \
    switch (m->rows) { \
    case 1: few_rows(m, MODE, 1, from, to, mine); break; \
    case 2: few_rows(m, MODE, 2, from, to, mine); break; \
    case 3: few_rows(m, MODE, 3, from, to, mine); break; \
    case 4: few_rows(m, MODE, 4, from, to, mine); break; \
    }
    if (m->rows > 4) return 0;
    EACH_MODE(CALL)
#undef CALL
    return 1;
}

/* A block of x in the order in which weights are unpacked: element 16 k + l is column 4 l + k. */
INLINE void arrange_block(const Matrix *m, const float *from, float *to) {
    __m512 part[4];
    for (int i = 0; i < 4; i++) part[i] = _mm512_loadu_ps(from + 16 * i);
    if (m->bits != PLAIN) {
        __m512i even = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
        __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(2));
        __m512 a = _mm512_permutex2var_ps(part[0], even, part[1]), b = _mm512_permutex2var_ps(part[2], even, part[3]);
        __m512 c = _mm512_permutex2var_ps(part[0], odd, part[1]), d = _mm512_permutex2var_ps(part[2], odd, part[3]);
        part[0] = _mm512_shuffle_f32x4(a, b, 0x44), part[1] = _mm512_shuffle_f32x4(a, b, 0xee);
        part[2] = _mm512_shuffle_f32x4(c, d, 0x44), part[3] = _mm512_shuffle_f32x4(c, d, 0xee);
    }
    for (int i = 0; i < 4; i++) _mm512_store_ps(to + 16 * i, part[i]);
}

#else

INLINE void codes(const uint32_t *words, const int64_t bits, int64_t count, float *to) {
    for (int64_t i = 0; i < count; i++) {
        int64_t at = i * bits;
        uint64_t field = words[at >> 5] >> (at & 31);
        if ((at & 31) + bits > 32) field |= (uint64_t)words[(at >> 5) + 1] << (32 - (at & 31));
        to[i] = (float)(field & ((1u << bits) - 1));
    }
}

/* 32 codes fill whole words: with the width known, the compiler has no shift left to work out. */
INLINE void fields(const uint32_t *words, const int64_t bits, int64_t count, float *to) {
    int64_t i = 0;
    for (; i + 32 <= count; i += 32, words += bits) codes(words, bits, 32, to + i);
    codes(words, bits, count - i, to + i);
}

static void unpacked(const Matrix *m, int64_t from, int64_t to, int64_t j0, int64_t j1, const Scratch *mine) {
    const Job *job = m->job;
    float *tile = mine->tile;
    int64_t first = j0 * BLOCK, width = (j1 - j0) * BLOCK, count = job->inputs - first;
    if (count > width) count = width;
    for (int64_t o = from; o < to; o++, tile += width) {
        memset(tile + count, 0, 4 * (width - count));
        if (m->bits == PLAIN) {
            widen(job->plain, job->plain_kind, (m->rank * job->outputs + o) * job->inputs + first, count, tile);
            continue;
        }
        const uint32_t *words = m->words + o * m->row_words + first * m->bits / 32;
        switch (m->bits) {
        case 1: fields(words, 1, count, tile); break;
        case 2: fields(words, 2, count, tile); break;
        case 3: fields(words, 3, count, tile); break;
        case 4: fields(words, 4, count, tile); break;
        case 5: fields(words, 5, count, tile); break;
        case 6: fields(words, 6, count, tile); break;
        case 7: fields(words, 7, count, tile); break;
        case 8: fields(words, 8, count, tile); break;
        }
        const float *scale = mine->scale + (o - from) * m->groups, *zero = mine->zero + (o - from) * m->groups;
        for (int64_t i = 0, g = first / job->group; i < count; g++) {
            int64_t end = (g + 1) * job->group - first;
            if (end > count) end = count;
            for (; i < end; i++) tile[i] = (tile[i] - zero[g]) * scale[g];
        }
    }
}

enum { LANES = 8 };

INLINE void product(const int rows, const float *x, int64_t x_stride, const float *tile, int64_t length,
                    float out[][WIDTH]) {
    float sum[ROWS][WIDTH][LANES] = {0};
    for (int64_t i = 0; i < length; i += LANES)
        for (int r = 0; r < rows; r++)
            for (int q = 0; q < WIDTH; q++)
                for (int l = 0; l < LANES; l++) sum[r][q][l] += x[r * x_stride + i + l] * tile[q * length + i + l];
    for (int r = 0; r < rows; r++)
        for (int q = 0; q < WIDTH; q++) {
            float *s = sum[r][q];
            out[r][q] = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
        }
}

static int in_registers(const Matrix *m, int64_t from, int64_t to, const Scratch *mine) {
    (void)m, (void)from, (void)to, (void)mine;
    return 0;
}

INLINE void arrange_block(const Matrix *m, const float *from, float *to) {
    (void)m;
    memcpy(to, from, 4 * BLOCK);
}

#endif

/* Many rows: a tile of weights is unpacked, and all rows run over it. */
static void many_rows(const Matrix *m, int64_t from, int64_t to, const Scratch *mine) {
    const Job *job = m->job;
    float *tile = mine->tile;
    int64_t stride = m->blocks * BLOCK;
    int64_t steps = (m->rows + ROWS - 1) / ROWS, step = (m->rows + steps - 1) / steps; /* no narrow last tile */
    for (int64_t j0 = 0; j0 < m->blocks; j0 += CHUNK) {
        int64_t j1 = j0 + CHUNK < m->blocks ? j0 + CHUNK : m->blocks, length = (j1 - j0) * BLOCK;
        unpacked(m, from, to, j0, j1, mine);
        for (int64_t o = to - from; o % WIDTH; o++) memset(tile + o * length, 0, 4 * length);
        for (int64_t r0 = 0; r0 < m->rows; r0 += step) {
            int64_t rows = m->rows - r0 < step ? m->rows - r0 : step;
            const float *x = m->x + r0 * stride + j0 * BLOCK;
            for (int64_t o = from; o < to; o += WIDTH) {
                const float *w = tile + (o - from) * length;
                float out[ROWS][WIDTH];
                switch (rows) {
                case 1: product(1, x, stride, w, length, out); break;
                case 2: product(2, x, stride, w, length, out); break;
#if WIDE
                case 3: product(3, x, stride, w, length, out); break;
                case 4: product(4, x, stride, w, length, out); break;
                case 5: product(5, x, stride, w, length, out); break;
#endif
                }
                for (int64_t r = 0; r < rows; r++) {
                    float *y = job->y + (m->first + r0 + r) * job->y_row + o * job->y_column;
                    for (int64_t q = 0; q < WIDTH && o + q < to; q++, y += job->y_column)
                        *y = j0 ? *y + out[r][q] : out[r][q];
                }
            }
        }
    }
}

/* Row r of x in float32, in the order in which the weights of its expert are unpacked, with zeros at the end. */
static int arrange(const Matrix *m, int64_t r, float *straight, float *to) {
    const Job *job = m->job;
    int64_t source = job->row ? job->row[m->first + r] : m->first + r, length = m->blocks * BLOCK;
    widen(job->x, job->x_kind, source * job->x_stride, job->inputs, straight);
#if PAIRS
    if (m->pairs) return arrange_pairs(job, m->bits, straight, m->pairs + r * pair_bytes(job, m->bits));
#endif
    memset(straight + job->inputs, 0, 4 * (length - job->inputs));
    for (int64_t j = 0; j < length; j += BLOCK) arrange_block(m, straight + j, to + j);
    return 1;
}

static void *aligned(int64_t bytes) {
    void *found = NULL;
    return posix_memalign(&found, 64, bytes < 64 ? 64 : (size_t)bytes) ? NULL : found;
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* 0, or 1 when there is no memory for the rows of x in float32. */
int coterie_grouped(const Job *job) {
    int64_t groups = (job->inputs + job->group - 1) / job->group;
    int64_t blocks = (job->inputs + BLOCK - 1) / BLOCK, stride = blocks * BLOCK;
    int64_t total = 0, active = 0, paired = 0;
    for (int64_t e = 0; e < job->experts; e++) total += job->count[e], active += job->count[e] > 0;
#if PAIRS
    for (int64_t e = 0; e < job->experts; e++)
        if (by_pairs(job, job->bits[e], job->count[e])) paired += job->count[e] * pair_bytes(job, job->bits[e]);
#endif
    if (!total || !job->outputs) return 0;
    int64_t per_expert = (job->outputs + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
    int64_t tile = larger(TILE_OUTPUTS * BLOCK * (blocks < CHUNK ? blocks : CHUNK), stride); /* or one row of x */
    int64_t grid = (TILE_OUTPUTS * groups + 15) / 16 * 16, scratch = tile + 2 * grid + blocks * BLOCK / 4;
    Matrix *matrix = malloc(active * sizeof(Matrix));
    int64_t *owner = malloc(total * sizeof(int64_t));
    float *x = aligned(4 * total * stride), *work = aligned(4 * scratch * job->threads);
    int32_t *lane_group = malloc(4 * stride);
    char *pairs = aligned(paired);
    int failed = !matrix || !owner || !x || !work || !lane_group || !pairs, large = 0;
    if (failed) goto done;
    int64_t first = 0, seen = 0;
#if PAIRS
    char *next_pairs = pairs;
#endif
    for (int64_t e = 0; e < job->experts; e++) {
        int64_t rows = job->count[e], bits = job->bits[e];
        if (!rows) continue;
        matrix[seen] = (Matrix){job, bits, (job->inputs * bits + 31) / 32, groups, blocks, job->rank[e], rows, first,
                                job->words + job->start[e], x + first * stride, lane_group, NULL};
#if PAIRS
        if (by_pairs(job, bits, rows)) {
            matrix[seen].pairs = next_pairs;
            next_pairs += rows * pair_bytes(job, bits);
        }
#endif
        for (int64_t r = 0; r < rows; r++) owner[first + r] = seen;
        first += rows;
        seen++;
    }
#if WIDE
    for (int64_t i = 0; i < stride; i++) {
        int64_t g = (i / BLOCK * BLOCK + i % 16 * 4 + i % BLOCK / 16) / job->group;
        lane_group[i] = (int32_t)(g < groups ? g : groups - 1); /* beyond the last column x is 0 */
    }
#endif
#pragma omp parallel num_threads((int)job->threads)
    {
#ifdef _OPENMP
        float *start = work + scratch * omp_get_thread_num();
#else
        float *start = work;
#endif
        Scratch mine = {start, start + tile, start + tile + grid, (char *)(start + tile + 2 * grid)};
#pragma omp for schedule(static)
        for (int64_t r = 0; r < total; r++) {
            const Matrix *m = &matrix[owner[r]];
            if (!arrange(m, r - m->first, mine.tile, x + r * stride)) {
#pragma omp atomic write
                large = 1;
            }
        }
        if (large) { /* numbers that must not meet 0, infinite ones among them: without pairs */
#pragma omp single
            for (int64_t i = 0; i < active; i++) matrix[i].pairs = NULL;
#pragma omp for schedule(static)
            for (int64_t r = 0; r < total; r++) {
                const Matrix *m = &matrix[owner[r]];
                arrange(m, r - m->first, mine.tile, x + r * stride);
            }
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < active * per_expert; task++) {
            const Matrix *m = &matrix[task / per_expert];
            int64_t from = task % per_expert * TILE_OUTPUTS, to = from + TILE_OUTPUTS;
            if (to > job->outputs) to = job->outputs;
            grids(m, from, to, &mine);
            if (!in_registers(m, from, to, &mine)) many_rows(m, from, to, &mine);
        }
    }
done:
    free(matrix), free(owner), free(x), free(work), free(lane_group), free(pairs);
    return failed;
}

/* What this build uses, for those who want to know. */
int coterie_wide(void) { return WIDE; }

int coterie_threaded(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}
