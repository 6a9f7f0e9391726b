// Runs every CPU kernel on odd shapes, for tests/build/test_sanitizers.py, which builds it with the sanitizers.
//   sanitize_cpu heap|fence            all ops, shapes, element types and instruction sets: 0 if all is well
//   sanitize_cpu heap|fence plant ISA  one buffer after the other is one element too short: 0 if each is noticed
// heap: exact heap blocks, which AddressSanitizer guards. fence: a block ends where an unreadable page begins, so that
// the CPU itself reports what the sanitizer does not instrument (masked loads and stores, inline assembly).
// Outputs start as NaN and must be finite afterwards; the bytes in front of a fenced block must be what they were.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "cpu/fastpetl_cpu.h"

namespace {

bool fence = false;
int short_buffer = -1;  // the buffer that is handed in one element too short
int buffers = 0;        // of the last case

void fail(const std::string& what, const std::string& why) {
  fprintf(stderr, "%s: %s\n", what.c_str(), why.c_str());
  _exit(3);
}

// The buffers of one case
struct Memory {
  struct Block { char *p, *map; size_t bytes, mapped, item; bool output; };
  std::string what;
  int dtype;
  std::vector<Block> blocks;
  uint32_t state = 1;
  Memory(std::string w, int t) : what(std::move(w)), dtype(t) {}
  Memory(const Memory&) = delete;
  ~Memory() {
    buffers = blocks.size();
    for (Block& b : blocks) fence ? (void)munmap(b.map, b.mapped) : free(b.p);
  }

  size_t size() const { return dtype == FP_F32 ? 4 : 2; }
  char* block(int64_t count, size_t item, bool output) {
    if ((int)blocks.size() == short_buffer && count > 0) --count;
    Block b{nullptr, nullptr, count * item, 0, item, output};
    if (fence) {
      const size_t page = sysconf(_SC_PAGESIZE), whole = (b.bytes + page - 1) / page * page;
      b.mapped = whole + 2 * page;
      b.map = (char*)mmap(nullptr, b.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      memset(b.map, 0xa5, page + whole);
      mprotect(b.map, page, PROT_READ);
      mprotect(b.map + page + whole, page, PROT_NONE);
      b.p = b.map + page + whole - b.bytes;
    } else {
      b.p = (char*)malloc(b.bytes);
    }
    memset(b.p, 0xff, b.bytes);  // NaN in every element type
    blocks.push_back(b);
    return b.p;
  }
  float draw() {  // about [-1, 1]
    state = state * 1664525u + 1013904223u;
    return (int32_t)state / 2147483648.f;
  }
  void put(char* p, float v) const {
    if (dtype == FP_F32) return (void)memcpy(p, &v, 4);
    uint32_t u;
    memcpy(&u, &v, 4);
    const int e = (int)(u >> 23 & 255) - 112;  // cut off, and too small to be normal in half is zero
    uint16_t half = dtype == FP_BF16 ? u >> 16 : (u >> 16 & 0x8000) | (e > 0 ? e << 10 | (u >> 13 & 0x3ff) : 0);
    memcpy(p, &half, 2);
  }
  bool is_nan(const Block& b, size_t i) const {
    uint32_t u = 0;
    memcpy(&u, b.p + i * b.item, b.item);
    return b.item == 4 ? (u & 0x7fffffff) > 0x7f800000 : (u & 0x7fff) > (dtype == FP_F16 ? 0x7c00 : 0x7f80);
  }
  void* in(int64_t count, float scale = 1, bool want = true) {
    if (!want) return nullptr;
    char* p = block(count, size(), false);
    for (size_t i = 0; i < blocks.back().bytes; i += size()) put(p + i, scale * draw());
    return p;
  }
  float* in_float(int64_t count) {
    float* p = (float*)block(count, 4, false);
    for (size_t i = 0; i < blocks.back().bytes / 4; ++i) p[i] = draw();
    return p;
  }
  int64_t* in_order(int64_t count, int64_t first, int64_t step) {
    int64_t* p = (int64_t*)block(count, 8, false);
    for (size_t i = 0; i < blocks.back().bytes / 8; ++i) p[i] = first + i * step;
    return p;
  }
  uint8_t* in_mask(int64_t count) {
    uint8_t* p = (uint8_t*)block(count, 1, false);
    for (size_t i = 0; i < blocks.back().bytes; ++i) p[i] = i % 3 == 0;
    return p;
  }
  void* out(int64_t count, bool want = true) { return want ? block(count, size(), true) : nullptr; }
  uint8_t* out_bytes(int64_t count) { return (uint8_t*)block(count, 1, true); }
  float* out_float(int64_t count, bool want = true) { return want ? (float*)block(count, 4, true) : nullptr; }
  void check() const {
    for (size_t n = 0; n < blocks.size(); ++n) {
      const Block& b = blocks[n];
      for (const char* p = b.map; p && p < b.p; ++p)
        if (*p != (char)0xa5) fail(what, "wrote in front of buffer " + std::to_string(n));
      for (size_t i = 0; b.output && i < b.bytes / b.item; ++i)
        if (is_nan(b, i)) fail(what, "left element " + std::to_string(i) + " of buffer " + std::to_string(n) + " unwritten, or NaN");
    }
  }
};

std::string name(const char* op, int dtype, std::vector<int64_t> sizes) {
  std::string s = std::string(fastpetl_cpu_isa()) + " " + op + " type " + std::to_string(dtype) + ":";
  for (int64_t n : sizes) s += " " + std::to_string(n);
  return s;
}

// variant: which optional operands there are
void adapter(int dtype, int64_t rows, int d, int r, int variant) {
  Memory m(name("adapter", dtype, {rows, d, r, variant}), dtype);
  const bool norm = variant & 1, bias = variant & 2;
  fp_adapter_forward f{};
  f.x = m.in(rows * d), f.w_down = m.in(int64_t(r) * d, .1f), f.w_up = m.in(int64_t(d) * r, .1f);
  f.b_down = m.in(r, 1, bias), f.b_up = m.in(d, 1, bias);
  f.norm_weight = m.in(d, 1, norm), f.norm_bias = m.in(d, 1, norm && bias);
  f.res1 = m.in(rows * d, 1, bias), f.res2 = m.in(rows * d, 1, norm);
  f.y = m.out(rows * d), f.z = m.out(rows * r), f.stats = m.out_float(2 * rows, norm);
  f.rows = rows, f.d = d, f.r = r, f.activation = variant % 5, f.add_x = bias, f.eps = 1e-5f, f.scale = .5f;
  fp_active()->adapter_forward(f, dtype);
  fp_adapter_backward b{};
  b.grad = m.in(rows * d), b.x = f.x, b.z = f.z, b.w_down = f.w_down, b.w_up = f.w_up, b.stats = f.stats;
  b.norm_weight = f.norm_weight, b.norm_bias = f.norm_bias;
  b.dx = m.out(rows * d, variant != 4);
  if (variant != 3) {
    b.dw_down = m.out(int64_t(r) * d), b.db_down = m.out(r), b.dw_up = m.out(int64_t(d) * r), b.db_up = m.out(d);
    b.dnorm_weight = m.out(d, norm), b.dnorm_bias = m.out(d, norm);
  }
  b.rows = rows, b.d = d, b.r = r, b.activation = f.activation, b.add_x = f.add_x, b.scale = f.scale;
  fp_active()->adapter_backward(b, dtype);
  m.check();
}

// variant: bit 0 the adapter's own norm, bit 1 biases and a second gradient, bits 2.. which gradients are wanted
void site(int dtype, int64_t rows, int d, int r, int tail, int variant) {
  Memory m(name("site", dtype, {rows, d, r, tail, variant}), dtype);
  const bool norm = variant & 1, bias = variant & 2, bare = variant & 4, sums = variant & 8;
  fp_adapter_forward f{};
  f.x = m.in(rows * d), f.w_down = m.in(int64_t(r) * d, .1f), f.w_up = m.in(int64_t(d) * r, .1f);
  f.b_down = m.in(r, 1, bias), f.b_up = m.in(d, 1, bias);
  f.norm_weight = m.in(d, 1, norm), f.norm_bias = m.in(d, 1, norm && bias);
  f.res1 = m.in(rows * d, 1, bias), f.res2 = m.in(rows * d, 1, norm);
  f.tail_weight = m.in(d), f.tail_bias = m.in(d, 1, bias);
  f.y = m.out(rows * d), f.n = m.out(rows * d), f.z = m.out(rows * r);
  f.stats = m.out_float(2 * rows, norm), f.tail_stats = m.out_float(2 * rows);
  f.rows = rows, f.d = d, f.r = r, f.activation = variant % 5, f.add_x = bias, f.tail = tail, f.eps = f.tail_eps = 1e-5f, f.scale = .5f;
  fp_active()->adapter_forward(f, dtype);
  fp_adapter_backward b{};
  b.g_s = m.in(rows * d, 1, bias), b.g_n = m.in(rows * d), b.y = f.y, b.tail_stats = f.tail_stats, b.tail_weight = f.tail_weight;
  b.x = f.x, b.z = f.z, b.w_down = f.w_down, b.w_up = f.w_up, b.stats = f.stats, b.norm_weight = f.norm_weight, b.norm_bias = f.norm_bias;
  b.g = m.out(rows * d), b.dtail_weight = m.out(d, !sums), b.dtail_bias = m.out(d, !sums && bias);
  if (!bare) {
    b.dx = m.out(rows * d), b.dw_down = m.out(int64_t(r) * d), b.db_down = m.out(r, bias);
    b.dw_up = m.out(int64_t(d) * r), b.db_up = m.out(d, bias), b.dnorm_weight = m.out(d, norm), b.dnorm_bias = m.out(d, norm && bias);
  }
  b.rows = rows, b.d = d, b.r = r, b.activation = f.activation, b.add_x = f.add_x, b.tail = tail, b.scale = f.scale;
  fp_active()->adapter_backward(b, dtype);
  if (dtype == FP_F32) {  // in the others a gain may be 0 here
    b.y = f.n, b.y_is_n = 1, b.tail_bias = f.tail_bias, b.g = m.out(rows * d);
    fp_active()->adapter_backward(b, dtype);
  }
  m.check();
}

// An adapter of two tasks: even rows, then odd ones
void tasks(int dtype, int64_t rows, int d, int r, bool norm) {
  Memory m(name("tasks", dtype, {rows, d, r, norm}), dtype);
  fp_adapter_forward f{};
  f.x = m.in(rows * d), f.w_down = m.in(int64_t(r) * d, .1f), f.w_up = m.in(int64_t(d) * r, .1f);
  f.norm_weight = m.in(d, 1, norm), f.res1 = m.in(rows * d);
  f.y = m.out(rows * d), f.z = m.out(rows * r), f.stats = m.out_float(2 * rows, norm);
  f.d = d, f.r = r, f.activation = FP_GELU, f.eps = 1e-5f, f.scale = .5f;
  fp_adapter_backward b{};
  b.grad = m.in(rows * d), b.x = f.x, b.z = f.z, b.w_down = f.w_down, b.w_up = f.w_up, b.stats = f.stats, b.norm_weight = f.norm_weight;
  b.dx = m.out(rows * d), b.d = d, b.r = r, b.activation = f.activation, b.scale = f.scale;
  for (int64_t t = 0; t < 2; ++t) {
    f.rows = b.rows = (rows + 1 - t) / 2, f.order = b.order = m.in_order(f.rows, t, 2);
    b.dw_down = m.out(int64_t(r) * d), b.db_down = m.out(r), b.dw_up = m.out(int64_t(d) * r), b.db_up = m.out(d), b.dnorm_weight = m.out(d, norm);
    fp_active()->adapter_forward(f, dtype);
    fp_active()->adapter_backward(b, dtype);
  }
  m.check();
}

void linear(int dtype, int64_t rows, int k, std::vector<int> n, int prologue, bool packed) {
  Memory m(name("linear", dtype, {rows, k, n[0], prologue, packed}), dtype);
  int64_t total = 0;
  std::vector<const void*> w, b;
  for (size_t i = 0; i < n.size(); ++i) {
    w.push_back(m.in(int64_t(n[i]) * k, .1f)), b.push_back(m.in(n[i], 1, i != 1));
    total += n[i];
  }
  fp_linear f{};
  f.x = m.in(rows * k), f.w = w.data(), f.b = b.data(), f.n = n.data(), f.count = n.size();
  f.rows = rows, f.k = k, f.prologue = prologue, f.eps = 1e-5f;
  const bool norm = prologue == FP_LAYERNORM;
  f.norm_weight = m.in(k, 1, norm), f.norm_bias = m.in(k, 1, norm);
  f.out = m.out(rows * total), f.stats = m.out_float(2 * rows, norm);
  auto pack = [&](int transposed) {
    void* p = aligned_alloc(64, (fp_active()->pack_bytes(k, total, dtype, transposed) + 63) / 64 * 64);
    fp_active()->pack(f, p, dtype, transposed);
    return p;
  };
  void *forward = packed ? pack(0) : nullptr, *backward = packed ? pack(1) : nullptr;
  f.packed = forward;
  fp_active()->linear_forward(f, dtype);
  f.packed = backward, f.grad = m.in(rows * total), f.out = m.out(rows * k);
  fp_active()->linear_backward(f, dtype);
  if (prologue == FP_PROLOGUE_GELU && k % 32 == 0) {
    f.packed = nullptr, f.code = m.out_bytes(rows * (k / 2 * 5)), f.out = m.out(rows * total);
    fp_active()->linear_forward(f, dtype);
    f.x = nullptr, f.out = m.out(rows * k);
    fp_active()->linear_backward(f, dtype);
  }
  for (f.then = FP_RELU; f.then <= FP_GELU && prologue != FP_PROLOGUE_GELU && total % 32 == 0; ++f.then) {
    f.packed = forward, f.out = m.out(rows * total), f.code = f.then == FP_GELU ? m.out_bytes(rows * (total / 2 * 5)) : nullptr;
    fp_active()->linear_forward(f, dtype);
  }
  free(forward), free(backward);
  m.check();
}

void activation(int dtype, int64_t rows, int k, int kind) {
  Memory m(name("activation", dtype, {rows, k, kind}), dtype);
  fp_activation_code a{};
  a.x = m.in(rows * k), a.rows = rows, a.k = k, a.activation = kind, a.scale = 1.5f;
  a.out = m.out(rows * k), a.code = m.out_bytes(kind == FP_RELU ? (rows * k + 7) / 8 : rows * (k / 2 * 5));
  fp_active()->activation_forward(a, dtype);
  a.out = m.out(rows * k);
  fp_active()->activation_backward(a, dtype);
  m.check();
}

void attention(int dtype, int64_t batch, int64_t tokens, int heads, int dim, bool mask) {
  Memory m(name("attention", dtype, {batch, tokens, heads, dim, mask}), dtype);
  const int64_t numel = batch * tokens * heads * dim;
  fp_attention a{};
  a.qkv = m.in(3 * numel), a.key_mask = mask ? m.in_float(batch * tokens) : nullptr;
  a.batch = batch, a.tokens = tokens, a.heads = heads, a.head_dim = dim, a.scale = .3f;
  a.out = m.out(numel), a.lse = m.out_float(batch * heads * tokens);
  fp_active()->attention_forward(a, dtype);
  a.out_in = a.out, a.grad = m.in(numel), a.dqkv = m.out(3 * numel);
  fp_active()->attention_backward(a, dtype);
  a.out_in = nullptr, a.dqkv = m.out(3 * numel);
  fp_active()->attention_backward(a, dtype);
  m.check();
}

void residual_norm(int dtype, int64_t rows, int d, int tail, bool mask, double dropout) {
  Memory m(name("residual_norm", dtype, {rows, d, tail, mask, dropout > 0}), dtype);
  fp_residual_norm a{};
  a.rows = rows, a.sample = mask ? 1 : rows, a.d = d, a.tail = tail, a.eps = 1e-5f, a.dropout = dropout, a.seed = 7;
  a.x = m.in(rows * d), a.f = m.in(rows * d), a.weight = m.in(d, 1, tail), a.bias = m.in(d, 1, tail == 1);
  a.mask = mask ? m.in_mask(rows) : nullptr;
  a.s = m.out(rows * d), a.n = m.out(rows * d, tail), a.stats = m.out_float(2 * rows, tail);
  fp_active()->residual_norm_forward(a, dtype);
  a.s_in = a.s, a.g_s = m.in(rows * d), a.g_n = m.in(rows * d, 1, tail);
  a.dx = m.out(rows * d), a.df = m.out(rows * d), a.dweight = m.out(d, tail), a.dbias = m.out(d, tail == 1);
  fp_active()->residual_norm_backward(a, dtype);
  m.check();
}

void phm(int dtype, std::vector<std::vector<int>> shapes, bool shared) {
  Memory m(name("phm", dtype, {(int64_t)shapes.size(), shapes[0][0], shapes[0][1], shapes[0][2], shared}), dtype);
  std::vector<fp_phm_layer> layers;
  for (auto& s : shapes) {
    fp_phm_layer y{};
    y.n = s[0], y.in = s[1], y.out = s[2];
    const int64_t cube = int64_t(y.n) * y.n * y.n, w = int64_t(y.n) * y.in * y.out;
    const bool own = layers.empty() || !shared;
    y.rule = own ? m.in(cube) : layers[0].rule, y.drule = own ? m.out(cube) : layers[0].drule;
    y.w = m.in(w), y.h = m.out(w * y.n), y.dw = m.out(w);
    layers.push_back(y);
  }
  fp_phm a{layers.data(), (int)layers.size(), shared};
  fp_active()->phm_forward(a, dtype);
  fp_active()->phm_backward(a, dtype);  // the gradient of H is H here
  m.check();
}

using Case = std::function<void(int dtype)>;

std::vector<Case> cases() {
  std::vector<Case> all;
  int variant = 0;
  for (int64_t rows : {0, 1, 199})
    for (int d : {760, 1128, 7}) {
      for (int r : {8, 100, 3}) {
        ++variant;
        all.push_back([=](int t) { adapter(t, rows, d, r, variant % 5); });
        all.push_back([=](int t) { site(t, rows, d, r, 1 + variant % 2, variant % 16); });
        all.push_back([=](int t) { linear(t, rows, d, {r, 5, 2 * r}, variant % 3, variant % 2); });
      }
      if (rows == 0) continue;  // the binding lets no empty residual_norm pass
      for (int tail : {0, 1, 2}) all.push_back([=](int t) { residual_norm(t, rows, d, tail, tail != 1, tail ? .25 : 0.); });
    }
  for (int64_t tokens : {1, 7, 40, 97, 199})
    for (int dim : {8, 64, 35}) all.push_back([=](int t) { attention(t, 2, tokens, 3, dim, tokens % 2); });
  all.push_back([](int t) { adapter(t, 33, 80, 48, 3), site(t, 33, 80, 48, 1, 3); });  // where a panel is no multiple of 32
  for (int norm : {0, 1}) all.push_back([=](int t) { tasks(t, 71, 76, 20, norm); });
  all.push_back([](int t) { site(t, 1700, 760, 8, 2, 3); });                         // several slices
  for (int64_t rows : {1, 33, 700}) {
    all.push_back([=](int t) { activation(t, rows, 96, FP_GELU); });
    for (int k : {1, 7, 96}) all.push_back([=](int t) { activation(t, rows, k, FP_RELU); });
  }
  all.push_back([](int t) { linear(t, 33, 3072, {20}, FP_PROLOGUE_GELU, false), linear(t, 700, 20, {7000}, FP_NONE, true); });  // deep; streamed
  for (int64_t rows : {450, 70})  // by rows, whose threads share what they pack, and by columns; in chunks of the depth
    for (int k : {40, 1100}) all.push_back([=](int t) { linear(t, rows, k, {60, 5, 95}, k == 40, rows == 70 && k == 40); });
  all.push_back([](int t) { phm(t, {{4, 19, 25}, {4, 192, 12}}, true), phm(t, {{3, 7, 5}, {2, 1, 33}}, false); });
  return all;
}
// small ones of every op, with all operands
std::vector<Case> planted() {
  return {
      [](int t) { adapter(t, 5, 7, 3, 7); },
      [](int t) { site(t, 5, 7, 3, 1, 3); },
      [](int t) { tasks(t, 5, 7, 3, true); },
      [](int t) { linear(t, 5, 7, {3, 5}, FP_LAYERNORM, false); },
      [](int t) { linear(t, 5, 7, {3}, FP_PROLOGUE_GELU, true); },
      [](int t) { linear(t, 5, 7, {32}, FP_NONE, false); },
      [](int t) { activation(t, 5, 32, FP_GELU); },
      [](int t) { activation(t, 5, 7, FP_RELU); },
      [](int t) { attention(t, 1, 5, 2, 7, true); },
      [](int t) { residual_norm(t, 5, 7, 1, true, .25); },
      [](int t) { phm(t, {{3, 7, 5}, {3, 7, 5}}, false); },
  };
}

int run_all() {
  const std::string isas = fastpetl_cpu_isas();
  int ran = 0;
  for (size_t at = 0; at < isas.size();) {
    const size_t end = std::min(isas.find(' ', at), isas.size());
    fastpetl_set_cpu_isa(isas.substr(at, end - at).c_str());
    at = end + 1;
    for (int dtype : {FP_F32, FP_BF16, FP_F16})
      for (const Case& c : cases()) c(dtype), ++ran;
  }
  printf("%d cases on %s\n", ran, isas.c_str());
  return 0;
}

// Each buffer of each planted case in a process of its own, which must not end well
int run_planted(const char* isa) {
  if (fastpetl_set_cpu_isa(isa)) return 2;
  int noticed = 0, missed = 0, which = 0;
  for (const Case& c : planted()) {
    ++which;
    for (int dtype : {FP_F32, FP_BF16, FP_F16}) {
      short_buffer = -1;
      c(dtype);
      for (short_buffer = 0; short_buffer < buffers; ++short_buffer) {
        fflush(stdout);
        const pid_t child = fork();
        if (child == 0) {
          if (!freopen("/dev/null", "w", stderr)) _exit(0);
          c(dtype);
          _exit(0);
        }
        int status;
        waitpid(child, &status, 0);
        status ? ++noticed : ++missed;
        if (!status) printf("case %d, type %d: a short buffer %d went unnoticed\n", which, dtype, short_buffer);
      }
    }
  }
  printf("noticed %d, missed %d\n", noticed, missed);
  return missed ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  fence = argc > 1 && !strcmp(argv[1], "fence");
  fp_parallel_for = [](int64_t n, int64_t grain, fp_task task, void* ctx) {
    const int64_t chunk = std::max(grain, (n + 2) / 3);
    std::vector<std::thread> threads;
    for (int64_t i = chunk; i < n; i += chunk) threads.emplace_back(task, ctx, i, std::min(n, i + chunk));
    task(ctx, 0, std::min(n, chunk));
    for (std::thread& t : threads) t.join();
  };
  return argc > 3 ? run_planted(argv[3]) : run_all();
}
