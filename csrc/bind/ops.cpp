// CPU ops on the LibTorch stable ABI: the adapter, the frozen linears and the attention.
#include "bind/tasks.h"

thread_local bool fp_alone = false;

namespace {

void use_torch_threads() {
  fp_parallel_for = [](int64_t n, int64_t grain, fp_task task, void* ctx) {
    if (fp_alone) return task(ctx, 0, n);
    torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { task(ctx, begin, end); });
  };
  fp_threads = [] { return fp_alone ? 1 : (int)torch::stable::get_num_threads(); };
}

std::tuple<Tensor, Tensor, Tensor> adapter_forward(const Tensor& x, const Tensor& w_down, const MaybeTensor& b_down, const Tensor& w_up,
                                                   const MaybeTensor& b_up, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias,
                                                   const MaybeTensor& res1, const MaybeTensor& res2, bool add_x, double eps,
                                                   int64_t activation, double scale, bool save) {
  const char* op = "cpu_adapter_forward";
  const int dtype = code(x, op);
  STD_TORCH_CHECK(x.dim() == 2 && w_down.dim() == 2, op, ": x and w_down must be 2-D");
  const int64_t rows = x.size(0), d = x.size(1), r = w_down.size(0);
  Tensor y = make(x, {rows, d});
  Tensor z = make(x, save ? std::vector<int64_t>{rows, r} : std::vector<int64_t>{0});
  Tensor stats = make(x, save && norm_weight ? std::vector<int64_t>{rows, 2} : std::vector<int64_t>{0}, ScalarType::Float);
  fp_adapter_forward a{};
  a.x = in(x, x, rows * d, op, "x");
  a.w_down = in(w_down, x, r * d, op, "w_down");
  a.b_down = in(b_down, x, r, op, "b_down");
  a.w_up = in(w_up, x, d * r, op, "w_up");
  a.b_up = in(b_up, x, d, op, "b_up");
  a.norm_weight = in(norm_weight, x, d, op, "norm_weight");
  a.norm_bias = in(norm_bias, x, d, op, "norm_bias");
  a.res1 = in(res1, x, rows * d, op, "res1");
  a.res2 = in(res2, x, rows * d, op, "res2");
  a.y = out(y), a.z = out(z), a.stats = static_cast<float*>(out(stats));
  a.rows = rows, a.d = d, a.r = r, a.activation = activation, a.add_x = add_x, a.eps = eps, a.scale = scale;
  if (rows) fp_active()->adapter_forward(a, dtype);
  return {y, z, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adapter_backward(
    const Tensor& grad, const Tensor& x, const Tensor& z, const Tensor& stats, const Tensor& w_down, const Tensor& w_up,
    const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, bool add_x, int64_t activation, double scale, int64_t needs) {
  const char* op = "cpu_adapter_backward";
  const int dtype = code(x, op);
  STD_TORCH_CHECK(x.dim() == 2 && w_down.dim() == 2, op, ": x and w_down must be 2-D");
  const int64_t rows = x.size(0), d = x.size(1), r = w_down.size(0);
  fp_adapter_backward a{};
  a.grad = in(grad, x, rows * d, op, "grad");
  a.x = in(x, x, rows * d, op, "x");
  a.z = in(z, x, rows * r, op, "z");
  a.stats = norm_weight ? in_float(stats, rows * 2, op, "stats") : nullptr;
  a.w_down = in(w_down, x, r * d, op, "w_down");
  a.w_up = in(w_up, x, d * r, op, "w_up");
  a.norm_weight = in(norm_weight, x, d, op, "norm_weight");
  a.norm_bias = in(norm_bias, x, d, op, "norm_bias");
  a.rows = rows, a.d = d, a.r = r, a.activation = activation, a.add_x = add_x, a.scale = scale;
  auto dx = wanted(needs & 1, x, {rows, d}), dwd = wanted(needs & 2, x, {r, d}), dbd = wanted(needs & 4, x, {r});
  auto dwu = wanted(needs & 8, x, {d, r}), dbu = wanted(needs & 16, x, {d});
  auto dnw = wanted((needs & 32) && norm_weight, x, {d}), dnb = wanted((needs & 64) && norm_weight, x, {d});
  a.dx = dx.second, a.dw_down = dwd.second, a.db_down = dbd.second, a.dw_up = dwu.second, a.db_up = dbu.second;
  a.dnorm_weight = dnw.second, a.dnorm_bias = dnb.second;
  fp_active()->adapter_backward(a, dtype);
  return {dx.first, dwd.first, dbd.first, dwu.first, dbu.first, dnw.first, dnb.first};
}

// The weights of one fp_linear: pointers that live as long as this object
struct Weights {
  std::vector<const void*> w, b;
  std::vector<int> n;
  int64_t total = 0, k = 0;
  Weights(const std::vector<Tensor>& weights, const char* op) {
    STD_TORCH_CHECK(!weights.empty(), op, ": weights is empty");
    k = weights[0].size(1);
    for (const Tensor& t : weights) {
      STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == k, op, ": weights must be [n, k] with one k");
      w.push_back(in(t, weights[0], t.size(0) * k, op, "weights"));
      n.push_back(t.size(0));
      total += t.size(0);
    }
  }
  void fill(fp_linear& a) const {
    a.w = w.data(), a.n = n.data(), a.count = w.size(), a.k = k;
    a.b = b.empty() ? nullptr : b.data();
  }
};
const void* in_packed(const MaybeTensor& packed, const Weights& ws, int dtype, int transposed, const char* op) {
  if (!packed) return nullptr;
  const int64_t bytes = fp_active()->pack_bytes(ws.k, ws.total, dtype, transposed);
  STD_TORCH_CHECK(packed->scalar_type() == ScalarType::Byte && packed->is_contiguous() && packed->numel() == bytes, op,
                  ": packed does not belong to these weights and this instruction set");
  return packed->const_data_ptr();
}

std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, std::vector<Tensor> weights, std::vector<Tensor> biases, int64_t prologue,
                                          const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, double eps, const MaybeTensor& packed) {
  const char* op = "cpu_linear_forward";
  const int dtype = code(x, op);
  Weights ws(weights, op);
  STD_TORCH_CHECK(weights[0].scalar_type() == x.scalar_type(), op, ": weights have another dtype than x");
  STD_TORCH_CHECK(biases.empty() || biases.size() == weights.size(), op, ": biases must be empty or one per weight");
  for (size_t i = 0; i < biases.size(); ++i) ws.b.push_back(in(biases[i], x, ws.n[i], op, "biases"));
  STD_TORCH_CHECK(x.dim() == 2, op, ": x must be 2-D");
  const int64_t rows = x.size(0);
  Tensor y = make(x, {rows, ws.total});
  const bool norm = prologue == FP_LAYERNORM;
  Tensor stats = make(x, norm ? std::vector<int64_t>{rows, 2} : std::vector<int64_t>{0}, ScalarType::Float);
  fp_linear a{};
  ws.fill(a);
  a.x = in(x, x, rows * ws.k, op, "x");
  a.packed = in_packed(packed, ws, dtype, 0, op);
  if (norm) a.norm_weight = in(norm_weight, x, ws.k, op, "norm_weight"), a.norm_bias = in(norm_bias, x, ws.k, op, "norm_bias");
  a.out = out(y), a.stats = static_cast<float*>(out(stats));
  a.rows = rows, a.prologue = prologue, a.eps = eps;
  if (rows) fp_active()->linear_forward(a, dtype);
  return {y, stats};
}

Tensor linear_backward(const Tensor& grad, const Tensor& x, const Tensor& stats, std::vector<Tensor> weights, int64_t prologue,
                       const MaybeTensor& norm_weight, const MaybeTensor& packed) {
  const char* op = "cpu_linear_backward";
  const int dtype = code(grad, op);
  Weights ws(weights, op);
  STD_TORCH_CHECK(weights[0].scalar_type() == grad.scalar_type(), op, ": weights have another dtype than grad");
  STD_TORCH_CHECK(grad.dim() == 2, op, ": grad must be 2-D");
  const int64_t rows = grad.size(0);
  Tensor dx = make(grad, {rows, ws.k});
  fp_linear a{};
  ws.fill(a);
  a.grad = in(grad, grad, rows * ws.total, op, "grad");
  if (prologue != FP_NONE) a.x = in(x, grad, rows * ws.k, op, "x");
  if (prologue == FP_LAYERNORM) {
    a.stats = const_cast<float*>(in_float(stats, rows * 2, op, "stats"));
    a.norm_weight = in(norm_weight, grad, ws.k, op, "norm_weight");
  }
  a.packed = in_packed(packed, ws, dtype, 1, op);
  a.out = out(dx), a.rows = rows, a.prologue = prologue;
  if (rows) fp_active()->linear_backward(a, dtype);
  return dx;
}

// A GELU in front of one weight set, its derivative kept as a code (cpu/activation_impl.h) instead of x
const Tensor& coded(const Tensor& x, int64_t k, const char* op) {
  STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::Float && k % 32 == 0, op, ": x must be 2-D float32, a multiple of 32 wide");
  return x;
}
Tensor make_code(const Tensor& like, std::vector<int64_t> size) { return make(like, size, ScalarType::Byte); }
uint8_t* in_code(const Tensor& code, int64_t bytes, const char* op) {
  STD_TORCH_CHECK(code.is_contiguous() && code.scalar_type() == ScalarType::Byte && code.numel() == bytes, op, ": code has the wrong size");
  return static_cast<uint8_t*>(const_cast<void*>(code.const_data_ptr()));
}
std::tuple<Tensor, Tensor> linear_forward_coded(const Tensor& x, std::vector<Tensor> weights, std::vector<Tensor> biases) {
  const char* op = "cpu_linear_forward_coded";
  Weights ws(weights, op);
  const int64_t rows = coded(x, ws.k, op).size(0);
  STD_TORCH_CHECK(biases.empty() || biases.size() == weights.size(), op, ": biases must be empty or one per weight");
  for (size_t i = 0; i < biases.size(); ++i) ws.b.push_back(in(biases[i], x, ws.n[i], op, "biases"));
  Tensor y = make(x, {rows, ws.total}), code = make_code(x, {rows, ws.k / 2 * 5});
  fp_linear a{};
  ws.fill(a);
  in(weights[0], x, ws.n[0] * ws.k, op, "weights");
  a.x = in(x, x, rows * ws.k, op, "x");
  a.out = out(y), a.code = static_cast<uint8_t*>(out(code)), a.rows = rows, a.prologue = FP_PROLOGUE_GELU;
  if (rows) fp_active()->linear_forward(a, FP_F32);
  return {y, code};
}
Tensor linear_backward_coded(const Tensor& grad, const Tensor& code, std::vector<Tensor> weights) {
  const char* op = "cpu_linear_backward_coded";
  Weights ws(weights, op);
  const int64_t rows = coded(grad, ws.k, op).size(0);
  Tensor dx = make(grad, {rows, ws.k});
  fp_linear a{};
  ws.fill(a);
  in(weights[0], grad, ws.n[0] * ws.k, op, "weights");
  a.grad = in(grad, grad, rows * ws.total, op, "grad");
  a.code = in_code(code, rows * (ws.k / 2 * 5), op);
  a.out = out(dx), a.rows = rows, a.prologue = FP_PROLOGUE_GELU;
  if (rows) fp_active()->linear_backward(a, FP_F32);
  return dx;
}

// (then(y), stats, code of a GELU where it is to be kept): a linear with an activation behind it
std::tuple<Tensor, Tensor, Tensor> linear_forward_then(const Tensor& x, std::vector<Tensor> weights, std::vector<Tensor> biases, int64_t prologue,
                                                       const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, double eps,
                                                       const MaybeTensor& packed, int64_t then, bool keep) {
  const char* op = "cpu_linear_forward_then";
  Weights ws(weights, op);
  const int64_t rows = coded(x, ws.total, op).size(0);
  STD_TORCH_CHECK(then == FP_GELU || (then == FP_RELU && !keep), op, ": then must be GELU, or ReLU without a code");
  const bool norm = prologue == FP_LAYERNORM;
  STD_TORCH_CHECK(norm || prologue == FP_NONE, op, ": prologue must be a norm or none");
  STD_TORCH_CHECK(biases.empty() || biases.size() == weights.size(), op, ": biases must be empty or one per weight");
  for (size_t i = 0; i < biases.size(); ++i) ws.b.push_back(in(biases[i], x, ws.n[i], op, "biases"));
  Tensor y = make(x, {rows, ws.total}), stats = make(x, norm ? std::vector<int64_t>{rows, 2} : std::vector<int64_t>{0}, ScalarType::Float);
  Tensor code = make_code(x, keep ? std::vector<int64_t>{rows, ws.total / 2 * 5} : std::vector<int64_t>{0});
  fp_linear a{};
  ws.fill(a);
  in(weights[0], x, ws.n[0] * ws.k, op, "weights");
  a.x = in(x, x, rows * ws.k, op, "x");
  a.packed = in_packed(packed, ws, FP_F32, 0, op);
  if (norm) a.norm_weight = in(norm_weight, x, ws.k, op, "norm_weight"), a.norm_bias = in(norm_bias, x, ws.k, op, "norm_bias");
  a.out = out(y), a.stats = static_cast<float*>(out(stats)), a.code = keep ? static_cast<uint8_t*>(out(code)) : nullptr;
  a.rows = rows, a.prologue = prologue, a.eps = eps, a.then = then;
  if (rows) fp_active()->linear_forward(a, FP_F32);
  return {y, stats, code};
}

fp_activation_code activation_args(const Tensor& x, int64_t activation, const char* op) {
  STD_TORCH_CHECK(activation == FP_RELU || activation == FP_GELU, op, ": activation must be ReLU or GELU");
  STD_TORCH_CHECK(x.dim() == 2 && (activation == FP_RELU || x.size(1) % 32 == 0), op, ": x must be 2-D, for GELU a multiple of 32 wide");
  fp_activation_code a{};
  a.x = in(x, x, x.numel(), op, "x"), a.rows = x.size(0), a.k = x.size(1), a.activation = activation;
  return a;
}
// (act(x), code), or with `activated` (nothing, x's code): x is ReLU's result already
std::tuple<Tensor, Tensor> activation_forward(const Tensor& x, int64_t activation, bool activated) {
  const char* op = "cpu_activation_forward";
  const int dtype = code(x, op);
  fp_activation_code a = activation_args(x, activation, op);
  STD_TORCH_CHECK(!activated || activation == FP_RELU, op, ": activated is for ReLU");
  Tensor y = make(x, activated ? std::vector<int64_t>{0} : std::vector<int64_t>{a.rows, a.k});
  Tensor kept = make_code(x, activation == FP_RELU ? std::vector<int64_t>{(x.numel() + 7) / 8} : std::vector<int64_t>{a.rows, a.k / 2 * 5});
  a.out = out(y), a.code = static_cast<uint8_t*>(out(kept));
  if (x.numel()) fp_active()->activation_forward(a, dtype);
  return {y, kept};
}
Tensor activation_backward(const Tensor& grad, const Tensor& kept, int64_t activation, double scale) {
  const char* op = "cpu_activation_backward";
  const int dtype = code(grad, op);
  fp_activation_code a = activation_args(grad, activation, op);
  a.code = in_code(kept, activation == FP_RELU ? (grad.numel() + 7) / 8 : a.rows * (a.k / 2 * 5), op);
  Tensor dx = make(grad, {a.rows, a.k});
  a.out = out(dx), a.scale = scale;
  if (grad.numel()) fp_active()->activation_backward(a, dtype);
  return dx;
}

Tensor linear_pack(std::vector<Tensor> weights, bool transposed) {
  const char* op = "cpu_linear_pack";
  Weights ws(weights, op);
  const int dtype = code(weights[0], op);
  fp_linear a{};
  ws.fill(a);
  Tensor packed = make(weights[0], {static_cast<int64_t>(fp_active()->pack_bytes(ws.k, ws.total, dtype, transposed))}, ScalarType::Byte);
  fp_active()->pack(a, packed.mutable_data_ptr(), dtype, transposed);
  return packed;
}

fp_attention attention_args(const Tensor& qkv, const MaybeTensor& key_mask, int64_t heads, double scale, const char* op) {
  STD_TORCH_CHECK(qkv.dim() == 3 && heads > 0 && qkv.size(2) % (3 * heads) == 0, op, ": qkv must be [batch, tokens, 3 * heads * head_dim]");
  fp_attention a{};
  a.batch = qkv.size(0), a.tokens = qkv.size(1), a.heads = heads, a.head_dim = qkv.size(2) / (3 * heads), a.scale = scale;
  a.qkv = in(qkv, qkv, qkv.numel(), op, "qkv");
  if (key_mask) a.key_mask = in_float(*key_mask, a.batch * a.tokens, op, "key_mask");
  return a;
}
std::tuple<Tensor, Tensor> attention_forward(const Tensor& qkv, const MaybeTensor& key_mask, int64_t heads, double scale, bool save) {
  const char* op = "cpu_attention_forward";
  const int dtype = code(qkv, op);
  fp_attention a = attention_args(qkv, key_mask, heads, scale, op);
  Tensor o = make(qkv, {a.batch, a.tokens, heads * a.head_dim});
  Tensor lse = make(qkv, save ? std::vector<int64_t>{a.batch, heads, a.tokens} : std::vector<int64_t>{0}, ScalarType::Float);
  a.out = out(o), a.lse = static_cast<float*>(out(lse));
  if (o.numel()) fp_active()->attention_forward(a, dtype);
  return {o, lse};
}
Tensor attention_backward(const Tensor& grad, const Tensor& qkv, const MaybeTensor& key_mask, const MaybeTensor& o, const Tensor& lse, int64_t heads, double scale) {
  const char* op = "cpu_attention_backward";
  const int dtype = code(qkv, op);
  fp_attention a = attention_args(qkv, key_mask, heads, scale, op);
  const int64_t numel = a.batch * a.tokens * heads * a.head_dim;
  a.grad = in(grad, qkv, numel, op, "grad"), a.out_in = in(o, qkv, numel, op, "out");
  a.lse = const_cast<float*>(in_float(lse, a.batch * heads * a.tokens, op, "lse"));
  Tensor dqkv = make(qkv, {qkv.size(0), qkv.size(1), qkv.size(2)});
  a.dqkv = out(dqkv);
  if (numel) fp_active()->attention_backward(a, dtype);
  return dqkv;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastpetl, m) {
  use_torch_threads();
  m.def("cpu_adapter_forward(Tensor x, Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, Tensor? norm_weight, Tensor? norm_bias, "
        "Tensor? res1, Tensor? res2, bool add_x, float eps, int activation, float scale, bool save) -> (Tensor, Tensor, Tensor)");
  m.def("cpu_adapter_backward(Tensor grad, Tensor x, Tensor z, Tensor stats, Tensor w_down, Tensor w_up, Tensor? norm_weight, Tensor? norm_bias, "
        "bool add_x, int activation, float scale, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("cpu_linear_forward(Tensor x, Tensor[] weights, Tensor[] biases, int prologue, Tensor? norm_weight, Tensor? norm_bias, float eps, "
        "Tensor? packed) -> (Tensor, Tensor)");
  m.def("cpu_linear_backward(Tensor grad, Tensor x, Tensor stats, Tensor[] weights, int prologue, Tensor? norm_weight, Tensor? packed) -> Tensor");
  m.def("cpu_linear_forward_coded(Tensor x, Tensor[] weights, Tensor[] biases) -> (Tensor, Tensor)");
  m.def("cpu_linear_forward_then(Tensor x, Tensor[] weights, Tensor[] biases, int prologue, Tensor? norm_weight, Tensor? norm_bias, float eps, "
        "Tensor? packed, int then, bool keep) -> (Tensor, Tensor, Tensor)");
  m.def("cpu_linear_backward_coded(Tensor grad, Tensor code, Tensor[] weights) -> Tensor");
  m.def("cpu_activation_forward(Tensor x, int activation, bool activated) -> (Tensor, Tensor)");
  m.def("cpu_activation_backward(Tensor grad, Tensor code, int activation, float scale) -> Tensor");
  m.def("cpu_linear_pack(Tensor[] weights, bool transposed) -> Tensor");
  m.def("cpu_attention_forward(Tensor qkv, Tensor? key_mask, int heads, float scale, bool save) -> (Tensor, Tensor)");
  m.def("cpu_attention_backward(Tensor grad, Tensor qkv, Tensor? key_mask, Tensor? out, Tensor lse, int heads, float scale) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastpetl, CPU, m) {
  m.impl("cpu_adapter_forward", TORCH_BOX(&adapter_forward));
  m.impl("cpu_adapter_backward", TORCH_BOX(&adapter_backward));
  m.impl("cpu_linear_forward", TORCH_BOX(&linear_forward));
  m.impl("cpu_linear_backward", TORCH_BOX(&linear_backward));
  m.impl("cpu_linear_forward_coded", TORCH_BOX(&linear_forward_coded));
  m.impl("cpu_linear_forward_then", TORCH_BOX(&linear_forward_then));
  m.impl("cpu_linear_backward_coded", TORCH_BOX(&linear_backward_coded));
  m.impl("cpu_activation_forward", TORCH_BOX(&activation_forward));
  m.impl("cpu_activation_backward", TORCH_BOX(&activation_backward));
  m.impl("cpu_linear_pack", TORCH_BOX(&linear_pack));
  m.impl("cpu_attention_forward", TORCH_BOX(&attention_forward));
  m.impl("cpu_attention_backward", TORCH_BOX(&attention_backward));
}
