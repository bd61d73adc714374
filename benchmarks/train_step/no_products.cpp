// Products and attention that allocate their results and compute nothing, in the place of the CPU's: what is left of a
// step's processor time is what its host does beside them. For a process of its own (host_share.py).

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace {

using at::Scalar;
using at::Tensor;
using Mask = const std::optional<Tensor>&;

Tensor mm(const Tensor& a, const Tensor& b) { return at::empty({a.size(0), b.size(1)}, a.options()); }

Tensor addmm(const Tensor&, const Tensor& a, const Tensor& b, const Scalar&, const Scalar&) { return mm(a, b); }

Tensor bmm(const Tensor& a, const Tensor& b) { return at::empty({a.size(0), a.size(1), b.size(2)}, a.options()); }

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor&, const Tensor&, double, bool, Mask,
                                     std::optional<double>) {
  return {at::empty_like(q), at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat))};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor&, const Tensor& q, const Tensor& k, const Tensor& v,
                                                      const Tensor&, const Tensor&, double, bool, Mask,
                                                      std::optional<double>) {
  return {at::empty_like(q), at::empty_like(k), at::empty_like(v)};
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("mm", mm);
  m.impl("addmm", addmm);
  m.impl("bmm", bmm);
  m.impl("_scaled_dot_product_flash_attention_for_cpu", attention);
  m.impl("_scaled_dot_product_flash_attention_for_cpu_backward", attention_backward);
}
