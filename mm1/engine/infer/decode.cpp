// Computes the whole decoder for a few new rows on a CPU, in one call and one parallel region. A step reads every weight
// once and computes little with it; torch, with its products of few rows and ten calls a layer, stays far below the
// memory's bandwidth. decode.py compiles this file for the machine; layers/decoder.py defines the computation. Weights
// and cache may be stored in other types, but arithmetic is fp32. The bits of a row do not depend on the other rows.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512F__
constexpr int LANES = 16, MAX_ROWS = 8;  // rows of x at once: 2 · 8 sums and a row of x fit into 32 registers
#else
constexpr int LANES = 8, MAX_ROWS = 4;
#endif
template <class T> using Lanes [[gnu::vector_size(LANES * sizeof(T))]] = T;
using Vec = Lanes<float>;
struct bf16 { uint16_t bits; };

extern "C" {
struct Matrix {  // [N, K], row-major
    const void *data;
    const float *scale;  // by row, of int8 weights
    int64_t kind;        // 0 float, 1 bf16, 2 int8
};

struct Layer {
    const float *norm1, *q_norm, *k_norm, *norm2;  // q_norm and k_norm may be null
    Matrix qkv, out, router, gate, up, down;
    int64_t experts;  // 1 in a dense layer, which has no router
    int64_t gate_stride;  // rows between the gates of two experts, and between their ups
    void *k, *v;  // [pages, page, G, Dh], of the type Model.cache
};

struct Model {
    int64_t width, heads, groups, head, ffn, chosen, layers, vocabulary, page, cache;
    float eps;
    const float *frequencies;  // [Dh/2]
    const float *norm;
    Matrix embedding, lm_head;
    const Layer *layer;
};
}

template <class T> static Lanes<T> raw(const T *p) {
    Lanes<T> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static Vec load(const float *p) { return raw(p); }
static Vec load(const int8_t *p) {  // in two steps, because compilers do not vectorize a conversion from 8 to 32 bits
    auto wider = __builtin_convertvector(raw(p), Lanes<int16_t>);
    return __builtin_convertvector(__builtin_convertvector(wider, Lanes<int32_t>), Vec);
}
static Vec load(const bf16 *p) {
    return (Vec)(__builtin_convertvector(raw(&p->bits), Lanes<uint32_t>) << 16);
}
static float to_float(float x) { return x; }
static float to_float(int8_t x) { return x; }
static float to_float(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
static void store(float *p, float x) { *p = x; }
static void store(bf16 *p, float x) {  // rounds to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    p->bits = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static void store(float *p, Vec x) { std::memcpy(p, &x, sizeof x); }
static Vec broadcast(float x) { return x - Vec{}; }
template <int N> static float sum(const float *x) {  // adds the halves, which are vectors too
    typedef float Half __attribute__((vector_size(N * 2)));
    Half a, b;
    std::memcpy(&a, x, sizeof a);
    std::memcpy(&b, x + N / 2, sizeof b);
    a += b;
    return sum<N / 2>((const float *)&a);
}
template <> float sum<1>(const float *x) { return *x; }
static float sum(Vec x) { return sum<LANES>((const float *)&x); }

// Returns e^x to 2 ulp (Cephes' polynomial); x is clamped to -87 … 88.
static Vec exp(Vec x) {
    x = x > broadcast(88) ? broadcast(88) : x < broadcast(-87) ? broadcast(-87) : x;
    Vec n = (x * 1.44269504f + 12582912.f) - 12582912.f, r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vec p = ((((r * 1.9875691500e-4f + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
             1.6666665459e-1f) * r + 5.0000001201e-1f;
    return (p * r * r + r + 1) * (Vec)((__builtin_convertvector(n, Lanes<int32_t>) + 127) << 23);
}

// Computes out[m][n] = w[n] · x[m]. ahead: distance, in elements, to the row of w to prefetch.
template <int N, int M, class W>
static void tile(const W *w, int64_t stride, const float *const *x, int64_t K, float (*out)[N], int64_t ahead = 0) {
    Vec acc[N][M] = {};
    int64_t k = 0;
    for (; k + LANES <= K; k += LANES)
        for (int n = 0; n < N; n++) {
            Vec a = load(w + n * stride + k);
            __builtin_prefetch(w + n * stride + k + ahead);
            for (int m = 0; m < M; m++) acc[n][m] += a * load(x[m] + k);
        }
    for (int n = 0; n < N; n++)
        for (int m = 0; m < M; m++) {
            float y = sum(acc[n][m]);
            for (int64_t i = k; i < K; i++) y += to_float(w[n * stride + i]) * x[m][i];
            out[m][n] = y;
        }
}

template <int N, int M, class W, class Emit>
static void emit_tile(const W *w, int64_t stride, const float *const *x, int64_t K, int m, int n, int64_t ahead,
                 Emit &&emit) {
    float out[M][N];
    tile<N, M>(w, stride, x + m, K, out, ahead);
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) emit(m + i, n + j, out[i][j]);
}

// Calls emit(m, n, w[n] · x[m]) for n < N. The few rows of x stay in the first-level cache while w is read once.
template <class W, class Emit>
static void rows(const W *w, int64_t stride, int N, const float *const *x, int M, int64_t K, Emit &&emit) {
    int m = 0, whole = N / 4 * 4;
    int64_t ahead = std::max<int64_t>(1, 1024 / stride) * stride;  // 4 kB of fp32; without it, reads wait for the products
    for (; m + MAX_ROWS <= M; m += MAX_ROWS)
        for (int n = 0; n < whole; n += 2) emit_tile<2, MAX_ROWS>(w + n * stride, stride, x, K, m, n, ahead, emit);
    for (; m + 2 <= M; m += 2)
        for (int n = 0; n < whole; n += 4) emit_tile<4, 2>(w + n * stride, stride, x, K, m, n, ahead, emit);
    for (; m < M; m++)
        for (int n = 0; n < whole; n += 4) emit_tile<4, 1>(w + n * stride, stride, x, K, m, n, ahead, emit);
    for (int n = whole; n < N; n++)
        for (m = 0; m < M; m++) emit_tile<1, 1>(w + n * stride, stride, x, K, m, n, ahead, emit);
}

// Calls emit(m, n, w[first + n] · x[m]) for n < N.
template <class Emit>
static void product(const Matrix &w, int64_t first, int N, const float *const *x, int M, int64_t K, Emit &&emit) {
    if (w.kind == 0) rows((const float *)w.data + first * K, K, N, x, M, K, emit);
    if (w.kind == 1) rows((const bf16 *)w.data + first * K, K, N, x, M, K, emit);
    if (w.kind == 2)
        rows((const int8_t *)w.data + first * K, K, N, x, M, K,
             [&](int m, int n, float y) { emit(m, n, y * w.scale[first + n]); });
}

static void norm(const float *x, const float *weight, int64_t n, float eps, float *y) {
    float total[1][1];
    tile<1, 1>(x, 0, &x, n, total);
    float scale = 1 / std::sqrt(total[0][0] / n + eps);
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
}

// Replaces n scores by their softmax without the division, and returns the sum to divide by.
static float exponentials(float *s, int64_t n) {
    float top = *std::max_element(s, s + n), total = 0;
    int64_t i = 0;
    Vec sums = {};
    for (; i + LANES <= n; i += LANES) {
        Vec e = exp(load(s + i) - top);
        sums += e;
        store(s + i, e);
    }
    for (; i < n; i++) total += s[i] = std::exp(s[i] - top);
    return total + sum(sums);
}

// Returns the first row of a page of one group; the next rows follow at a distance of c.groups · c.head.
template <class T> static T *page_of(const Model &c, void *cache, int32_t page, int64_t g) {
    return (T *)cache + (page * c.page * c.groups + g) * c.head;
}

// Normalizes and rotates the queries and the key of one row and group, qkv fp32 [R + 2, Dh], and stores key and value
// in the cache.
template <class T>
static void rotate_and_store(const Model &c, const Layer &l, float *qkv, int64_t g, int64_t position, const int32_t *pages,
                 const float *cosines, const float *sines) {
    int64_t R = c.heads / c.groups, D = c.head, half = D / 2;
    for (int64_t r = 0; r <= R; r++) {
        float *x = qkv + r * D;
        if (const float *weight = r < R ? l.q_norm : l.k_norm) norm(x, weight, D, c.eps, x);
        for (int64_t i = 0; i < half; i++) {
            float a = x[i], b = x[i + half];
            x[i] = a * cosines[i] - b * sines[i];
            x[i + half] = b * cosines[i] + a * sines[i];
        }
    }
    int64_t row = position % c.page * c.groups * D;
    T *k = page_of<T>(c, l.k, pages[position / c.page], g) + row;
    T *v = page_of<T>(c, l.v, pages[position / c.page], g) + row;
    for (int64_t i = 0; i < D; i++) store(k + i, qkv[R * D + i]), store(v + i, qkv[(R + 1) * D + i]);
}

// Adds Σ_j s[j] · v[j] to N vectors of y; rows j of v are `stride` apart.
template <int N, class T>
static void weighted(const T *v, int64_t stride, int64_t rows, const float *s, float *y) {
    Vec acc[N];
    for (int i = 0; i < N; i++) acc[i] = load(y + i * LANES);
    for (int64_t j = 0; j < rows; j++)
        for (int i = 0; i < N; i++) {
            acc[i] += load(v + j * stride + i * LANES) * s[j];
            __builtin_prefetch(v + (j + rows) * stride + i * LANES);
        }
    for (int i = 0; i < N; i++) store(y + i * LANES, acc[i]);
}

// Computes attention y [H, Dh] of one row over its text up to itself, for groups `first` to `end`, page by page.
template <class T>
static void attend(const Model &c, const Layer &l, const float *qkv, int64_t first, int64_t end, int64_t position,
                   const int32_t *pages, const float **heads, float *scores, float *y) {
    int64_t R = c.heads / c.groups, D = c.head, length = position + 1, stride = c.groups * D;
    float scale = 1 / std::sqrt(float(D));
    for (int64_t h = first * R; h < end * R; h++) heads[h] = qkv + (h / R * (R + 2) + h % R) * D;
    for (int64_t j = 0; j < length; j += c.page)
        for (int64_t g = first; g < end; g++)
            rows(page_of<T>(c, l.k, pages[j / c.page], g), stride, int(std::min(c.page, length - j)), heads + g * R,
                 int(R), D, [&](int r, int n, float s) { scores[(g * R + r) * length + j + n] = s * scale; });
    std::fill(y + first * R * D, y + end * R * D, 0.f);
    for (int64_t h = first * R; h < end * R; h++) {
        float total = exponentials(scores + h * length, length);
        for (int64_t j = 0; j < length; j++) scores[h * length + j] /= total;
    }
    for (int64_t j = 0; j < length; j += c.page)
        for (int64_t h = first * R; h < end * R; h++) {
            const T *v = page_of<T>(c, l.v, pages[j / c.page], h / R);
            const float *s = scores + h * length + j;
            int64_t n = std::min(c.page, length - j), i = 0;
            for (; i + 4 * LANES <= D; i += 4 * LANES) weighted<4>(v + i, stride, n, s, y + h * D + i);
            for (; i + LANES <= D; i += LANES) weighted<1>(v + i, stride, n, s, y + h * D + i);
            for (; i < D; i++)
                for (int64_t m = 0; m < n; m++) y[h * D + i] += to_float(v[m * stride + i]) * s[m];
        }
}

// Chooses the K experts of a token with the highest logits, the first of equal ones, and their softmax weights.
static void choose(const float *logits, int64_t E, int64_t K, int32_t *index, float *weight) {
    float total = 0;
    for (int64_t k = 0; k < K; k++) {
        int64_t best = -1;
        for (int64_t e = 0; e < E; e++)
            if (std::find(index, index + k, e) == index + k && (best < 0 || logits[e] > logits[best])) best = e;
        index[k] = int32_t(best);
        total += weight[k] = std::exp(logits[best] - logits[index[0]]);
    }
    for (int64_t k = 0; k < K; k++) weight[k] /= total;
}

// Computes B rows, given by their tokens or as embeddings fp32 [B, D]. positions [B]: in their texts; pages: of each
// row's text. For the `count` rows in `outputs` it writes logits fp32 [count, V], the best token and its log-probability.
extern "C" void decode(const Model *model, int64_t B, const int64_t *tokens, const float *embedded,
                       const int64_t *positions, const int32_t *const *pages, int64_t count, const int64_t *outputs,
                       float *logits, int64_t *best, float *logprobs, int threads) {
    const Model &c = *model;
    const int64_t D = c.width, H = c.heads * c.head, K = c.chosen, half = c.head / 2, R = c.heads / c.groups;
    const int64_t QKV = (R + 2) * c.head * c.groups, longest = 1 + *std::max_element(positions, positions + B);
    const int64_t block = B > MAX_ROWS ? 32 : 4;  // rows of a weight at once; for many rows of x they stay in a cache
    const int64_t together = B < threads ? 1 : c.groups;  // groups of a row for one thread: their keys are adjacent
    int64_t max_experts = 1;
    for (int64_t i = 0; i < c.layers; i++) max_experts = std::max(max_experts, c.layer[i].experts);
    std::vector<float> x(B * D), y(B * D), qkv(B * QKV), attended(B * H), hidden(B * K * c.ffn), cosines(B * half),
        sines(B * half), router(B * max_experts), weight(B * K);
    std::vector<int32_t> index(B * K);
    struct Slot { int64_t token, place; };  // place: index of its row in `hidden`
    std::vector<std::vector<Slot>> slots(max_experts);
    std::vector<int64_t> active;
    std::vector<const float *> normed(B), rows_attended(B), last(count);
    for (int64_t b = 0; b < B; b++) normed[b] = &y[b * D], rows_attended[b] = &attended[b * H];
    for (int64_t i = 0; i < count; i++) last[i] = normed[outputs[i]];

    #pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores(c.heads * longest);
        std::vector<const float *> inputs(std::max(B * K, c.heads));
        #pragma omp for schedule(static)
        for (int64_t b = 0; b < B; b++) {
            for (int64_t i = 0; i < half; i++) {
                float angle = float(positions[b]) * c.frequencies[i];
                cosines[b * half + i] = std::cos(angle), sines[b * half + i] = std::sin(angle);
            }
            for (int64_t i = 0; i < D; i++)
                x[b * D + i] = embedded           ? embedded[b * D + i]
                               : c.embedding.kind ? to_float(((const bf16 *)c.embedding.data)[tokens[b] * D + i])
                                                  : ((const float *)c.embedding.data)[tokens[b] * D + i];
        }
        // Calls emit(m, n, w[n] · in[m]) for all rows n of w, which are divided among the threads.
        auto linear = [&](const Matrix &w, int64_t N, const std::vector<const float *> &in, int64_t width, auto emit) {
            #pragma omp for schedule(static)
            for (int64_t n = 0; n < N; n += block)
                product(w, n, int(std::min(block, N - n)), in.data(), int(in.size()), width,
                        [&](int m, int i, float v) { emit(m, n + i, v); });
        };
        auto normalize = [&](const float *by) {
            #pragma omp for schedule(static)
            for (int64_t b = 0; b < B; b++) norm(&x[b * D], by, D, c.eps, &y[b * D]);
        };
        for (int64_t i = 0; i < c.layers; i++) {
            const Layer &l = c.layer[i];
            normalize(l.norm1);
            linear(l.qkv, QKV, normed, D, [&](int m, int64_t n, float v) { qkv[m * QKV + n] = v; });
            auto group = [&](int64_t b, int64_t g) { return &qkv[b * QKV + g * (R + 2) * c.head]; };
            #pragma omp for schedule(static)
            for (int64_t task = 0; task < B * c.groups; task++) {
                int64_t b = task / c.groups, g = task % c.groups;
                (c.cache ? rotate_and_store<bf16> : rotate_and_store<float>)(
                    c, l, group(b, g), g, positions[b], pages[b], &cosines[b * half], &sines[b * half]);
            }
            #pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < B * c.groups; task += together) {
                int64_t b = task / c.groups, g = task % c.groups;
                (c.cache ? attend<bf16> : attend<float>)(c, l, &qkv[b * QKV], g, g + together, positions[b], pages[b],
                                                         inputs.data(), scores.data(), &attended[b * H]);
            }
            linear(l.out, D, rows_attended, H, [&](int m, int64_t n, float v) { x[m * D + n] += v; });
            normalize(l.norm2);
            const int64_t E = l.experts, chosen = E > 1 ? K : 1;
            if (E > 1) linear(l.router, E, normed, D, [&](int m, int64_t n, float v) { router[m * E + n] = v; });
            #pragma omp single
            {
                active.clear();
                for (int64_t b = 0; b < B; b++) {
                    index[b * chosen] = 0, weight[b * chosen] = 1;
                    if (E > 1) choose(&router[b * E], E, K, &index[b * K], &weight[b * K]);
                }
                for (auto &slot : slots) slot.clear();
                for (int64_t s = 0; s < B * chosen; s++) {
                    if (slots[index[s]].empty()) active.push_back(index[s]);
                    slots[index[s]].push_back({s / chosen, s});
                }
                std::sort(active.begin(), active.end());  // the order of sums must not depend on other rows
            }
            const int64_t F = c.ffn, blocks = (F + block - 1) / block;
            #pragma omp for schedule(static)
            for (int64_t task = 0; task < int64_t(active.size()) * blocks; task++) {
                int64_t e = active[task / blocks], f = task % blocks * block;
                int N = int(std::min(block, F - f)), M = int(slots[e].size());
                for (int m = 0; m < M; m++) inputs[m] = normed[slots[e][m].token];
                auto row = [&](int m) { return &hidden[slots[e][m].place * F + f]; };
                product(l.gate, e * l.gate_stride + f, N, inputs.data(), M, D,
                        [&](int m, int n, float v) { row(m)[n] = v / (1 + std::exp(-v)); });
                product(l.up, e * l.gate_stride + f, N, inputs.data(), M, D,
                        [&](int m, int n, float v) { row(m)[n] *= v; });
            }
            #pragma omp for schedule(static)
            for (int64_t n = 0; n < D; n += block)
                for (int64_t e : active) {
                    int M = int(slots[e].size());
                    for (int m = 0; m < M; m++) inputs[m] = &hidden[slots[e][m].place * F];
                    product(l.down, e * D + n, int(std::min(block, D - n)), inputs.data(), M, F,
                            [&](int m, int j, float v) {
                                const Slot &slot = slots[e][m];
                                x[slot.token * D + n + j] += v * weight[slot.place];
                            });
                }
        }
        normalize(c.norm);
        linear(c.lm_head, c.vocabulary, last, D, [&](int m, int64_t n, float v) { logits[m * c.vocabulary + n] = v; });
        #pragma omp for schedule(static)
        for (int64_t b = 0; b < count; b++) {
            const float *row = logits + b * c.vocabulary, *top = std::max_element(row, row + c.vocabulary);
            Vec sums = {};
            int64_t i = 0;
            for (; i + LANES <= c.vocabulary; i += LANES) sums += exp(load(row + i) - *top);
            float total = sum(sums);
            for (; i < c.vocabulary; i++) total += std::exp(row[i] - *top);
            best[b] = top - row, logprobs[b] = -std::log(total);
        }
    }
}
