// The PHM weights' ops: lists of layers in, one flat tensor out.
#include "bind/check.h"

namespace {

// The layers, checked; `h` is the flat tensor of all H (forward: written, backward: their gradient)
struct Layers {
  std::vector<fp_phm_layer> layers;
  int64_t total = 0, rule_total = 0, weight_total = 0;
  int dtype;
  bool shared;
  Layers(const std::vector<Tensor>& rules, const std::vector<Tensor>& weights, const char* op) {
    STD_TORCH_CHECK(!weights.empty() && (rules.size() == 1 || rules.size() == weights.size()), op,
                    ": expected as many rules as weights, or one");
    dtype = code(weights[0], op), shared = rules.size() == 1;
    for (size_t i = 0; i < weights.size(); ++i) {
      const Tensor &w = weights[i], &rule = rules[shared ? 0 : i];
      STD_TORCH_CHECK(w.dim() == 3, op, ": weights must be [n, in / n, out / n]");
      const int64_t n = w.size(0);
      fp_phm_layer a{};
      a.n = n, a.in = w.size(1), a.out = w.size(2);
      a.w = in(w, weights[0], n * a.in * a.out, op, "weights");
      a.rule = in(rule, weights[0], n * n * n, op, "rules");
      total += n * n * a.in * a.out, weight_total += n * a.in * a.out;
      if (!shared || i == 0) rule_total += n * n * n;
      layers.push_back(a);
    }
  }
  fp_phm arguments() const { return {layers.data(), static_cast<int>(layers.size()), shared}; }
  // pointers into flat tensors, which may be null
  void place(char* h, char* drules, char* dweights) {
    const int64_t size = dtype == FP_F32 ? 4 : 2;
    for (fp_phm_layer& a : layers) {
      const int64_t cube = int64_t(a.n) * a.n * a.n, w = int64_t(a.n) * a.in * a.out;
      a.h = h, h += w * a.n * size;
      a.drule = drules, a.dw = dweights;
      if (drules && !shared) drules += cube * size;
      if (dweights) dweights += w * size;
    }
  }
};

Tensor phm_forward(std::vector<Tensor> rules, std::vector<Tensor> weights) {
  Layers a(rules, weights, "cpu_phm_forward");
  Tensor h = make(weights[0], {a.total});
  a.place(static_cast<char*>(out(h)), nullptr, nullptr);
  if (a.total) fp_active()->phm_forward(a.arguments(), a.dtype);
  return h;
}

std::tuple<Tensor, Tensor> phm_backward(const Tensor& grad, std::vector<Tensor> rules, std::vector<Tensor> weights, int64_t needs) {
  const char* op = "cpu_phm_backward";
  Layers a(rules, weights, op);
  const void* g = in(grad, weights[0], a.total, op, "grad");
  auto dr = wanted(needs & 1, grad, {a.rule_total}), dw = wanted(needs & 2, grad, {a.weight_total});
  a.place(static_cast<char*>(const_cast<void*>(g)), static_cast<char*>(dr.second), static_cast<char*>(dw.second));
  if (a.total && needs & 3) fp_active()->phm_backward(a.arguments(), a.dtype);
  return {dr.first, dw.first};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastpetl, m) {
  m.def("cpu_phm_forward(Tensor[] rules, Tensor[] weights) -> Tensor");
  m.def("cpu_phm_backward(Tensor grad, Tensor[] rules, Tensor[] weights, int needs) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastpetl, CPU, m) {
  m.impl("cpu_phm_forward", TORCH_BOX(&phm_forward));
  m.impl("cpu_phm_backward", TORCH_BOX(&phm_backward));
}
