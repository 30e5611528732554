#include "bindings/activation/run_context.h"

#include <ATen/Context.h>
#include <ATen/autocast_mode.h>

#include <algorithm>
#include <cstring>
#include <mutex>

namespace mlsys::activation {

namespace {

at::CPUGeneratorImpl& cpu_generator() {
  return *at::check_generator<at::CPUGeneratorImpl>(at::detail::getDefaultCPUGenerator());
}

void set_autocast(const AutocastState& state) {
  at::autocast::set_autocast_enabled(state.device, state.enabled);
  at::autocast::set_autocast_dtype(state.device, state.dtype);
  at::autocast::set_autocast_cache_enabled(state.cached);
}

}  // namespace

CpuRandomState CpuRandomState::now() {
  at::CPUGeneratorImpl& generator = cpu_generator();
  const std::lock_guard<std::mutex> lock(generator.mutex_);
  return {generator.engine(), generator.next_float_normal_sample(), generator.next_double_normal_sample()};
}

void CpuRandomState::restore() const {
  at::CPUGeneratorImpl& generator = cpu_generator();
  const std::lock_guard<std::mutex> lock(generator.mutex_);
  generator.set_engine(engine);
  generator.set_next_float_normal_sample(next_float);
  generator.set_next_double_normal_sample(next_double);
}

bool CpuRandomState::equals(const CpuRandomState& other) const {
  const at::mt19937_data_pod mine = engine.data(), others = other.engine.data();
  return mine.next_ == others.next_ && mine.left_ == others.left_ && mine.seed_ == others.seed_ &&
         next_float == other.next_float && next_double == other.next_double && mine.state_ == others.state_;
}

DeviceRandomState DeviceRandomState::now(at::Generator generator) {
  const std::lock_guard<std::mutex> lock(generator.mutex());
  const uint64_t seed = generator.current_seed(), offset = generator.get_offset();
  return {std::move(generator), seed, offset};
}

void DeviceRandomState::restore() {
  const std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_current_seed(seed);
  generator.set_offset(offset);
}

AutocastState AutocastState::now(at::DeviceType device) {
  return {device, at::autocast::is_autocast_enabled(device), at::autocast::get_autocast_dtype(device),
          at::autocast::is_autocast_cache_enabled()};
}

RunContext::RunContext(const std::vector<at::Tensor>& arguments)
    : cpu_(std::make_unique<CpuRandomState>(CpuRandomState::now())),
      autocast_{AutocastState::now(at::DeviceType::CPU)} {
  std::vector<at::Device> seen;
  for (const at::Tensor& argument : arguments) {
    const at::Device device = argument.device();
    if (device.is_cpu() || device.is_meta() || std::find(seen.begin(), seen.end(), device) != seen.end())
      continue;
    seen.push_back(device);
    devices_.push_back(DeviceRandomState::now(at::globalContext().defaultGenerator(device)));
    if (seen.size() == 1) autocast_.push_back(AutocastState::now(device.type()));
  }
}

void RunContext::forget_unused() {
  if (cpu_->equals(CpuRandomState::now())) cpu_.reset();
  std::erase_if(devices_, [](const DeviceRandomState& state) {
    const DeviceRandomState present = DeviceRandomState::now(state.generator);
    return present.seed == state.seed && present.offset == state.offset;
  });
}

RunContext::Restored::Restored(const RunContext& context) {
  if (context.cpu_) {
    cpu_ = std::make_unique<CpuRandomState>(CpuRandomState::now());
    context.cpu_->restore();
  }
  for (DeviceRandomState state : context.devices_) {
    devices_.push_back(DeviceRandomState::now(state.generator));
    state.restore();
  }
  for (const AutocastState& state : context.autocast_) {
    const AutocastState present = AutocastState::now(state.device);
    if (present == state) continue;
    autocast_.push_back(present);
    at::autocast::increment_nesting();
    set_autocast(state);
  }
}

RunContext::Restored::~Restored() {
  for (const AutocastState& state : autocast_) {
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    set_autocast(state);
  }
  for (DeviceRandomState& state : devices_) state.restore();
  if (cpu_) cpu_->restore();
}

}  // namespace mlsys::activation
