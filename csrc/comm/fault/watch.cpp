#include "comm/fault/watch.h"

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace mlsys::comm {

Watch::Watch(const Topology& topology, const ControlBlock& block, const Faults& faults,
             std::vector<UniqueFd> pidfds, std::map<int, Socket> controls, std::vector<int> listeners,
             std::function<void()> on_caller)
    : topology_(topology),
      block_(block),
      faults_(faults),
      pidfds_(std::move(pidfds)),
      listeners_(std::move(listeners)),
      on_caller_(std::move(on_caller)),
      told_left_(static_cast<size_t>(topology.local_size()), false),
      owner_(::getpid()) {
  for (auto& [leader, socket] : controls) controls_.push_back({leader, std::move(socket), {}});
  thread_ = std::thread([this] { run(); });
}

void Watch::stop() {
  if (!thread_.joinable()) return;
  if (owner_ != ::getpid()) {
    thread_.detach();
    return;
  }
  stopping_.store(true, std::memory_order_seq_cst);
  raise_eventfd(faults_.doorbell_fd());
  thread_.join();
  controls_.clear();
}

// The doorbell, the pidfds, the controls, the listeners.
std::vector<pollfd> Watch::polls() const {
  std::vector<pollfd> polls{{faults_.doorbell_fd(), POLLIN, 0}};
  for (size_t local = 0; local < pidfds_.size(); ++local) {
    const bool own = static_cast<int>(local) == topology_.local_index();
    polls.push_back({own ? -1 : pidfds_[local].get(), POLLIN, 0});  // negative entries are ignored
  }
  for (const Control& control : controls_) polls.push_back({control.socket.fd(), POLLIN, 0});
  for (const int listener : listeners_) polls.push_back({listener, POLLIN, 0});
  return polls;
}

void Watch::run() noexcept {
  try {
    for (;;) {
      std::vector<pollfd> waiting = polls();
      if (::poll(waiting.data(), waiting.size(), -1) < 0) {
        if (errno == EINTR) continue;
        throw_errno("poll of the watch thread");
      }
      // The doorbell comes first: a poison record names the root cause of the deaths that follow it. It is
      // drained before stopping_ is read, since stop() sets that before it rings: read the other way round, a
      // ring between the two would be swallowed and the thread would sleep for ever.
      on_doorbell();
      if (stopping_.load(std::memory_order_seq_cst)) {
        on_doorbell();  // what was told to this rank before stop()
        return;
      }
      const pollfd* next = waiting.data() + 1;
      for (size_t local = 0; local < pidfds_.size(); ++local) {
        if ((next++)->revents != 0) on_death(local);
      }
      std::vector<Control> alive;
      for (Control& control : controls_) {
        if ((next++)->revents == 0 || on_control(control)) alive.push_back(std::move(control));
      }
      controls_ = std::move(alive);
      if (std::any_of(next, next + listeners_.size(), [](const pollfd& p) { return p.revents != 0; })) {
        listeners_.clear();
        on_caller_();
      }
    }
  } catch (const std::exception& error) {
    // Without a watch thread this rank would not notice failures; that itself is one.
    faults_.poison_peer(topology_.rank, std::string("its watch thread failed: ") + error.what(),
                        Descriptor{});
  }
}

void Watch::on_doorbell() {
  drain_eventfd(faults_.doorbell_fd());
  if (faults_.poisoned() && !told_poison_) {
    told_poison_ = true;
    faults_.raise_abort();
    relay({ControlFrame::Type::kPoison, -1, faults_.record()});
  }
  for (int local = 0; local < topology_.local_size(); ++local) {
    const int rank = topology_.local_ranks()[static_cast<size_t>(local)];
    if (told_left_[static_cast<size_t>(local)] || !faults_.has_left(rank)) continue;
    told_left_[static_cast<size_t>(local)] = true;
    relay({ControlFrame::Type::kLeft, rank, {}});
  }
}

void Watch::on_death(size_t local) {
  pidfds_[local].reset();
  const int rank = topology_.local_ranks()[local];
  if (faults_.has_left(rank)) return;
  faults_.poison_peer(rank, "its process died", last_operation(rank));
}

bool Watch::on_control(Control& control) {
  uint8_t buffer[ControlFrame::kBytes];
  const ssize_t got =
      ::recv(control.socket.fd(), buffer, sizeof(buffer) - control.inbox.size(), MSG_DONTWAIT);
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return true;
  if (got <= 0) {
    if (!faults_.has_left(control.leader)) {
      const std::string how = got == 0 ? "closed" : std::strerror(errno);
      faults_.poison_peer(control.leader, "its process died (control connection: " + how + ")", Descriptor{});
    }
    return false;
  }
  control.inbox.insert(control.inbox.end(), buffer, buffer + got);
  if (control.inbox.size() < ControlFrame::kBytes) return true;
  const std::optional<ControlFrame> frame = decode_control_frame(control.inbox, topology_.size);
  control.inbox.clear();
  if (!frame) {
    faults_.poison_peer(control.leader, "it sent an invalid control frame", Descriptor{});
    return false;
  }
  if (frame->type == ControlFrame::Type::kLeft) {
    faults_.mark_left(frame->left_rank);
  } else {
    told_poison_ = true;  // its sender tells everyone
    faults_.poison(frame->poison);
  }
  return true;
}

void Watch::relay(const ControlFrame& frame) {
  const auto bytes = encode(frame);
  for (Control& control : controls_) {
    // A frame fits the socket's empty buffer. When it does not go through, that host is failing by itself.
    (void)::send(control.socket.fd(), bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  }
}

Descriptor Watch::last_operation(int rank) const {
  const RankSlot& slot = block_.slot(topology_.local_of[rank]);
  return slot.descriptors[slot.arrived.value.load(std::memory_order_acquire) & 1];
}

}  // namespace mlsys::comm
