/* The elementwise half of the delta form on a CPU, fused: what torch does in several passes over memory, in one.
 *
 * Rows are (set, prompt) pairs; the clean side has no set axis and is shared. All strides are in elements. bfloat16
 * travels as uint16_t. Differences are formed without subtracting two nearly equal numbers wherever algebra allows.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define SIMD _Pragma("omp simd")

typedef struct { int64_t set, prompt, pos; } Strides;

INLINE float bits_to_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE uint32_t float_to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
INLINE float from_bf16(uint16_t x) { return bits_to_float((uint32_t)x << 16); }

/* Round to nearest even; NaN stays NaN. */
INLINE uint16_t to_bf16(float x) {
    uint32_t bits = float_to_bits(x);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

/* `half` is a compile-time constant at every call, so each use becomes a loop of one type. */
INLINE float load(const void *p, int64_t i, int half) {
    return half ? from_bf16(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}
INLINE void store(void *p, int64_t i, float x, int half) {
    if (half) ((uint16_t *)p)[i] = to_bf16(x); else ((float *)p)[i] = x;
}

/* exp to about 1 ulp (Cody-Waite reduction, polynomial of degree 6); a loop over it vectorises. 0 below exp(−80): what
 * is smaller would make denormal products, which are slow, and adds nothing to a sum that holds a 1. */
INLINE float exp_(float argument) {
    float x = argument < -80.0f ? -80.0f : argument > 88.0f ? 88.0f : argument;
    float n = rintf(x * 1.44269504088896341f);
    float r = fmaf(n, -0.693145751953125f, x);
    r = fmaf(n, -1.42860682030941723e-6f, r);
    float p = 1.3888889e-3f;
    p = fmaf(p, r, 8.3333333e-3f);
    p = fmaf(p, r, 4.1666667e-2f);
    p = fmaf(p, r, 1.6666667e-1f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    p *= bits_to_float((uint32_t)((int32_t)n + 127) << 23);
    return argument < -80.0f ? 0 : p;
}

/* ---- δ ← δ + product;  δn = norm(x + δ) − norm(x) ---------------------------------------------------------------
 * With c = x − mean(x), d = δ − mean(δ) (means are 0 for RMSNorm), s² = mean(c²) + eps and t² the same of c + d:
 *     δn = w (c (1/t − 1/s) + d / t),   1/t − 1/s = −(t² − s²) / (s t (s + t)),   t² − s² = mean(d (2c + d))
 * in which nothing cancels. */
INLINE void norm_row(const float *x, const float *from, const void *product, float *delta, const float *weight,
                     void *out, int64_t d, float eps, int layer_norm, int half) {
    float sum_x = 0, sum_d = 0;
    if (product) {
        SIMD for (int64_t i = 0; i < d; i++) delta[i] = from[i] + load(product, i, half);
    } else {
        memcpy(delta, from, d * sizeof(float));
    }
    if (layer_norm) {
        _Pragma("omp simd reduction(+ : sum_x, sum_d)") for (int64_t i = 0; i < d; i++) {
            sum_x += x[i];
            sum_d += delta[i];
        }
    }
    float mean_x = sum_x / d, mean_d = sum_d / d, square = 0, change = 0;
    _Pragma("omp simd reduction(+ : square, change)") for (int64_t i = 0; i < d; i++) {
        float c = x[i] - mean_x, e = delta[i] - mean_d;
        square += c * c;
        change += e * (2 * c + e);
    }
    change /= d;
    float s2 = square / d + eps, t2 = s2 + change;
    t2 = t2 > eps ? t2 : eps;
    float s = sqrtf(s2), t = sqrtf(t2), inverse = 1 / t;
    float difference = -change / (s * t * (s + t));
    SIMD for (int64_t i = 0; i < d; i++) {
        float c = x[i] - mean_x, e = delta[i] - mean_d;
        store(out, i, weight[i] * (c * difference + e * inverse), half);
    }
}

void norm_delta(const float *clean, Strides clean_at, const float *delta, Strides delta_at, const void *product,
                Strides product_at, const float *weight, float *sum, void *out, int64_t n_sets, int64_t n_prompts,
                int64_t n_pos, int64_t d, float eps, int layer_norm, int half, int n_threads) {
    int64_t n_rows = n_sets * n_prompts * n_pos, size = half ? 2 : 4;
#pragma omp parallel for num_threads(n_threads) schedule(static)
    for (int64_t row = 0; row < n_rows; row++) {
        int64_t pos = row % n_pos, prompt = row / n_pos % n_prompts, set = row / n_pos / n_prompts;
        const float *x = clean + prompt * clean_at.prompt + pos * clean_at.pos;
        const float *from = delta + set * delta_at.set + prompt * delta_at.prompt + pos * delta_at.pos;
        int64_t at = set * product_at.set + prompt * product_at.prompt + pos * product_at.pos;
        const void *p = product ? (const char *)product + at * size : 0;
        float *to = sum + row * d;
        void *o = (char *)out + row * d * size;
        if (half) norm_row(x, from, p, to, weight, o, d, eps, layer_norm, 1);
        else norm_row(x, from, p, to, weight, o, d, eps, layer_norm, 0);
    }
}

/* ---- δpost = act(u + δu) − act(u), or gated: act(g + δg)(u + δu) − act(g) u ------------------------------------- */
enum { GELU_NEW, SILU, RELU };

INLINE float activate(float x, int activation) {
    if (activation == RELU) return x > 0 ? x : 0;
    /* 0.5 (1 + tanh(y)) = 1 / (1 + exp(−2y)) */
    float y = activation == GELU_NEW ? 1.5957691216057308f * (x + 0.044715f * x * x * x) : x;
    return x / (1 + exp_(-y));
}

INLINE void activation_row(const float *pre, const float *linear, const float *post, const void *delta_pre,
                           const void *delta_linear, void *out, int64_t n, int activation, int gated, int half) {
    SIMD for (int64_t i = 0; i < n; i++) {
        float row = activate(pre[i] + load(delta_pre, i, half), activation);
        if (gated) row *= linear[i] + load(delta_linear, i, half);
        store(out, i, row - post[i], half);
    }
}

void activation_delta(const float *pre, const float *linear, const float *post, int64_t prompt_stride,
                      const void *delta_pre, const void *delta_linear, int64_t delta_stride, void *out, int64_t n_sets,
                      int64_t n_prompts, int64_t n_pos, int64_t d_mlp, int activation, int half, int n_threads) {
    int64_t n_rows = n_sets * n_prompts * n_pos, size = half ? 2 : 4;
#pragma omp parallel for num_threads(n_threads) schedule(static)
    for (int64_t row = 0; row < n_rows; row++) {
        int64_t at = row / n_pos % n_prompts * prompt_stride + row % n_pos * d_mlp;
        const float *u = pre + at, *l = linear ? linear + at : 0, *p = post + at;
        const char *du = (const char *)delta_pre + row * delta_stride * size;
        const char *dl = linear ? (const char *)delta_linear + row * delta_stride * size : 0;
        char *o = (char *)out + row * d_mlp * size;
#define CASE(ACTIVATION, GATED) \
    do { if (half) activation_row(u, l, p, du, dl, o, d_mlp, ACTIVATION, GATED, 1); \
         else activation_row(u, l, p, du, dl, o, d_mlp, ACTIVATION, GATED, 0); } while (0)
#define GATES(ACTIVATION) do { if (linear) CASE(ACTIVATION, 1); else CASE(ACTIVATION, 0); } while (0)
        if (activation == GELU_NEW) GATES(GELU_NEW);
        else if (activation == SILU) GATES(SILU);
        else GATES(RELU);
#undef GATES
#undef CASE
    }
}

/* ---- δz = attn(q + δq, k + δk, v + δv) − z ----------------------------------------------------------------------
 * One (row, KV head) at a time: its keys (transposed, so that scores vectorise over keys) and values stay in cache. */
typedef struct {
    const float *q, *k, *v, *z;       /* clean: q, z cover the last n_q positions, k, v all n_k; [prompt, pos, head, d] */
    Strides q_at, k_at, v_at, z_at;   /* `set` unused; the head's stride is d_head */
    const void *dq, *dk, *dv;         /* null where nothing changes; before rotary embedding */
    Strides dq_at, dk_at, dv_at;
    const float *cos, *sin;           /* [n_k, d_head / 2], or null */
    const uint8_t *mask;              /* [set, pos, head]: where `source` takes the place of δz; or null */
    const float *source;              /* [prompt, pos, head, d]: source − clean */
    Strides mask_at, source_at;
    void *out;                        /* [set, prompt, n_q, head, d] */
    int64_t n_sets, n_prompts, n_q, n_k, n_new, n_heads, n_kv, d_head;
} Attention;

/* x + δ of one head at one position, δ turned by its position's angle. */
INLINE void row_value(const float *x, const void *delta, int64_t at, const float *cos, const float *sin, float *out,
                      int64_t d, int half) {
    if (!cos) {
        SIMD for (int64_t i = 0; i < d; i++) out[i] = x[i] + load(delta, at + i, half);
        return;
    }
    int64_t h = d / 2;
    SIMD for (int64_t i = 0; i < h; i++) {
        float a = load(delta, at + i, half), b = load(delta, at + h + i, half);
        out[i] = x[i] + a * cos[i] - b * sin[i];
        out[h + i] = x[h + i] + b * cos[i] + a * sin[i];
    }
}

/* Sixteen lanes in a register, QUERIES of them at a time: small enough products never to leave the core. */
#define LANES 16
#define QUERIES 4
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4)));
#define PAD(n) (((n) + LANES - 1) / LANES * LANES)
#define LOAD(p) (*(const Unaligned *)(p))
#define STORE(p, x) (*(Unaligned *)(p) = (x))

/* out[r][·] = Σ_c left[r][c] right[c][·] for QUERIES rows of `left` and n_out (a multiple of LANES) columns. */
INLINE void small_product(const float *left, int64_t left_stride, const float *right, int64_t right_stride,
                          float *out, int64_t out_stride, int64_t n_inner, int64_t n_out) {
    for (int64_t j = 0; j < n_out; j += LANES) {
        Lanes sum[QUERIES] = {0};
        for (int64_t c = 0; c < n_inner; c++) {
            Lanes lane = LOAD(right + c * right_stride + j);
            _Pragma("GCC unroll 4") for (int r = 0; r < QUERIES; r++) sum[r] += left[r * left_stride + c] * lane;
        }
        for (int r = 0; r < QUERIES; r++) STORE(out + r * out_stride + j, sum[r]);
    }
}

/* Softmax of the first n_read scores in place; what follows them, up to n_all (a multiple of LANES), becomes 0. */
INLINE void softmax(float *scores, int64_t n_read, int64_t n_all) {
    float top = scores[0], total = 0;
    for (int64_t j = n_read; j < n_all; j++) scores[j] = -INFINITY;
    _Pragma("omp simd reduction(max : top)") for (int64_t j = 0; j < n_all; j++)
        top = scores[j] > top ? scores[j] : top;
    _Pragma("omp simd reduction(+ : total)") for (int64_t j = 0; j < n_all; j++) {
        float p = exp_(scores[j] - top);
        scores[j] = p;
        total += p;
    }
    float inverse = 1 / total;
    SIMD for (int64_t j = 0; j < n_all; j++) scores[j] *= inverse;
}

typedef struct { float *keys, *values, *queries, *scores, *z; } Scratch;

int64_t scratch_size(const Attention *a) {
    int64_t d = PAD(a->d_head), k = PAD(a->n_k);
    return d * k + k * d + QUERIES * (d + k + d);
}

/* Keys [d_head, n_k] and values [n_k, d_head] of a row and KV head, padded to whole lanes. */
INLINE void form_keys_and_values(const Attention *a, int64_t set, int64_t prompt, int64_t kv, Scratch s, int half) {
    int64_t d = a->d_head, n_k = a->n_k, shared = n_k - a->n_new, k_stride = PAD(n_k), v_stride = PAD(d);
    float value[d];
    for (int64_t j = 0; j < n_k; j++) {
        const float *k = a->k + prompt * a->k_at.prompt + j * a->k_at.pos + kv * d;
        if (a->dk && j >= shared) {
            int64_t at = set * a->dk_at.set + prompt * a->dk_at.prompt + (j - shared) * a->dk_at.pos + kv * d;
            int64_t angle = j * (d / 2);
            row_value(k, a->dk, at, a->cos ? a->cos + angle : 0, a->cos ? a->sin + angle : 0, value, d, half);
            k = value;
        }
        for (int64_t c = 0; c < d; c++) s.keys[c * k_stride + j] = k[c];
        const float *v = a->v + prompt * a->v_at.prompt + j * a->v_at.pos + kv * d;
        if (a->dv && j >= shared) {
            int64_t at = set * a->dv_at.set + prompt * a->dv_at.prompt + (j - shared) * a->dv_at.pos + kv * d;
            row_value(v, a->dv, at, 0, 0, s.values + j * v_stride, d, half);
        } else {
            memcpy(s.values + j * v_stride, v, d * sizeof(float));
        }
    }
}

INLINE int is_patched(const Attention *a, int64_t set, int64_t i, int64_t head) {
    return a->mask && a->mask[set * a->mask_at.set + i * a->mask_at.pos + head];
}

/* The n queries from `first` on, turned and scaled. */
INLINE void form_queries(const Attention *a, int64_t set, int64_t prompt, int64_t head, int64_t first, int64_t n,
                         Scratch s, int half) {
    int64_t d = a->d_head;
    float scale = 1 / sqrtf((float)d);
    for (int64_t i = first; i < first + n; i++) {
        int64_t angle = (a->n_k - a->n_q + i) * (d / 2);
        const float *q = a->q + prompt * a->q_at.prompt + i * a->q_at.pos + head * d;
        float *to = s.queries + (i - first) * PAD(d);
        if (a->dq) {
            int64_t at = set * a->dq_at.set + prompt * a->dq_at.prompt + i * a->dq_at.pos + head * d;
            row_value(q, a->dq, at, a->cos ? a->cos + angle : 0, a->cos ? a->sin + angle : 0, to, d, half);
        } else {
            memcpy(to, q, d * sizeof(float));
        }
        SIMD for (int64_t c = 0; c < d; c++) to[c] *= scale;
    }
}

INLINE void write_delta(const Attention *a, int64_t set, int64_t prompt, int64_t i, int64_t head, const float *z,
                        int half) {
    int64_t d = a->d_head, at = (((set * a->n_prompts + prompt) * a->n_q + i) * a->n_heads + head) * d;
    if (is_patched(a, set, i, head)) {
        const float *source = a->source + prompt * a->source_at.prompt + i * a->source_at.pos + head * d;
        SIMD for (int64_t c = 0; c < d; c++) store(a->out, at + c, source[c], half);
    } else {
        const float *clean = a->z + prompt * a->z_at.prompt + i * a->z_at.pos + head * d;
        SIMD for (int64_t c = 0; c < d; c++) store(a->out, at + c, z[c] - clean[c], half);
    }
}

INLINE void prefetch(const void *delta, Strides at, int64_t set, int64_t prompt, int64_t n_pos, int64_t first,
                     int64_t n, int64_t size) {
    if (!delta) return;
    const char *row = (const char *)delta + (set * at.set + prompt * at.prompt + first) * size;
    for (int64_t i = 0; i < n_pos; i++)
        for (int64_t byte = 0; byte < n * size; byte += 64) __builtin_prefetch(row + i * at.pos * size + byte);
}

/* The δ that a later unit of work reads: short pieces far apart, which the processor does not foresee. */
INLINE void prefetch_unit(const Attention *a, int64_t unit, int64_t size) {
    int64_t row = unit / a->n_kv, kv = unit % a->n_kv, d = a->d_head, group = a->n_heads / a->n_kv;
    int64_t set = row / a->n_prompts, prompt = row % a->n_prompts;
    prefetch(a->dk, a->dk_at, set, prompt, a->n_new, kv * d, d, size);
    prefetch(a->dv, a->dv_at, set, prompt, a->n_new, kv * d, d, size);
    prefetch(a->dq, a->dq_at, set, prompt, a->n_q, kv * group * d, group * d, size);
}

/* Every head of one KV head and row. A head that is patched at every position is not computed. */
INLINE void attend(const Attention *a, int64_t set, int64_t prompt, int64_t kv, Scratch s, int half) {
    int64_t d = a->d_head, n_q = a->n_q, group = a->n_heads / a->n_kv, k_stride = PAD(a->n_k), z_stride = PAD(d);
    int formed = 0;
    for (int64_t head = kv * group; head < (kv + 1) * group; head++) {
        int64_t n_patched = 0;
        for (int64_t i = 0; i < n_q; i++) n_patched += is_patched(a, set, i, head);
        if (n_patched < n_q && !formed) form_keys_and_values(a, set, prompt, kv, s, half);
        formed |= n_patched < n_q;
        for (int64_t first = 0; first < n_q; first += QUERIES) {
            int64_t n = n_q - first < QUERIES ? n_q - first : QUERIES, n_seen = a->n_k - n_q + first + n;
            if (n_patched < n_q) {
                form_queries(a, set, prompt, head, first, n, s, half);
                small_product(s.queries, z_stride, s.keys, k_stride, s.scores, k_stride, d, PAD(n_seen));
                for (int64_t r = 0; r < n; r++) softmax(s.scores + r * k_stride, n_seen - n + r + 1, PAD(n_seen));
                small_product(s.scores, k_stride, s.values, z_stride, s.z, z_stride, n_seen, z_stride);
            }
            for (int64_t r = 0; r < n; r++) write_delta(a, set, prompt, first + r, head, s.z + r * z_stride, half);
        }
    }
}

extern int omp_get_thread_num(void);

/* `scratch` holds scratch_size floats per thread. */
void attention_delta(const Attention *a, float *scratch, int half, int n_threads) {
    int64_t n_units = a->n_sets * a->n_prompts * a->n_kv, d = PAD(a->d_head), k = PAD(a->n_k);
#pragma omp parallel num_threads(n_threads)
    {
        float *mine = scratch + omp_get_thread_num() * scratch_size(a);
        memset(mine, 0, scratch_size(a) * sizeof(float));
        float *queries = mine + 2 * d * k;
        Scratch s = {mine, mine + d * k, queries, queries + QUERIES * d, queries + QUERIES * (d + k)};
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < n_units; unit++) {
            int64_t row = unit / a->n_kv, kv = unit % a->n_kv;
            if (unit + 1 < n_units) prefetch_unit(a, unit + 1, half ? 2 : 4);
            if (half) attend(a, row / a->n_prompts, row % a->n_prompts, kv, s, 1);
            else attend(a, row / a->n_prompts, row % a->n_prompts, kv, s, 0);
        }
    }
}
