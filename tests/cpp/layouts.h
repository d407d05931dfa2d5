// The same tensors in each of the formats, ready to be written.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "safetensors_layout.h"
#include "support.h"
#include "zip_layout.h"

namespace fastsd::test {

inline std::unique_ptr<Layout> lay_out_zip(const std::vector<Tensor>& tensors) {
  Plan plan = make_plan(tensors);
  plan.finish_apart();
  const ZipLayout::Records records = {{"data.pkl", std::string(5000, 'p')}, {"empty", ""}};
  return std::make_unique<ZipLayout>(std::move(plan), "archive", records, 64);
}

inline std::unique_ptr<Layout> lay_out_safetensors(const std::vector<Tensor>& tensors) {
  Plan plan = make_plan(tensors);
  plan.finish_apart_by_width();
  return std::make_unique<SafetensorsLayout>(std::move(plan), "");
}

inline std::unique_ptr<Layout> lay_out_fsd(const std::vector<Tensor>& tensors) {
  Plan plan = make_plan(tensors);
  plan.finish();
  return std::make_unique<FsdLayout>(std::move(plan), 0, std::vector<std::string>{"cpu"},
                                     FsdLayout::Sections{});
}

using LayOut = std::unique_ptr<Layout> (*)(const std::vector<Tensor>& tensors);
constexpr LayOut kLayOuts[] = {lay_out_fsd, lay_out_zip, lay_out_safetensors};

}  // namespace fastsd::test
