#include "comm/fault/watch.h"

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "comm/fault/process_state.h"

namespace mlsys::comm {
namespace {

// A connection that ends without a word is most often a death that follows another one, of which a neighbour
// may be about to tell.
constexpr std::chrono::milliseconds kDoubt{10};
constexpr std::chrono::milliseconds kAskPatience{40};
constexpr std::chrono::milliseconds kTellPatience{100};

}  // namespace

Watch::Watch(const Topology& topology, const ControlBlock& block, const Faults& faults,
             std::vector<UniqueFd> pidfds, std::map<int, Socket> controls, std::vector<int> listeners,
             std::function<void()> on_caller, std::function<void()> on_failure)
    : topology_(topology),
      block_(block),
      faults_(faults),
      pidfds_(std::move(pidfds)),
      died_(static_cast<size_t>(topology.local_size()), false),
      listeners_(std::move(listeners)),
      on_caller_(std::move(on_caller)),
      on_failure_(std::move(on_failure)),
      told_presence_(static_cast<size_t>(topology.local_size()), kPresent),
      told_notices_(static_cast<size_t>(topology.local_size()), 0),
      has_controls_(!controls.empty()),
      owner_(::getpid()) {
  for (auto& [peer, socket] : controls) controls_.push_back({peer, std::move(socket), {}, {}, {}, {}});
  faults_.attach([this] { return inquire(); });
  thread_ = std::thread([this] { run(); });
}

void Watch::stop() {
  if (!thread_.joinable()) return;
  if (owner_ != ::getpid()) {
    thread_.detach();
    return;
  }
  faults_.attach(nullptr);
  stopping_.store(true, std::memory_order_seq_cst);
  raise_eventfd(faults_.doorbell_fd());
  thread_.join();
  controls_.clear();
  pidfds_.clear();
}

// The doorbell, the pidfds, the controls, the listeners.
std::vector<pollfd> Watch::polls() const {
  std::vector<pollfd> polls{{faults_.doorbell_fd(), POLLIN, 0}};
  for (size_t local = 0; local < pidfds_.size(); ++local) {
    const bool watched = static_cast<int>(local) != topology_.local_index() && !died_[local];
    polls.push_back({watched ? pidfds_[local].get() : -1, POLLIN, 0});  // negative entries are ignored
  }
  for (const Control& control : controls_) {
    const auto events = static_cast<short>(control.outbox.empty() ? POLLIN : POLLIN | POLLOUT);
    polls.push_back({control.socket ? control.socket.fd() : -1, events, 0});
  }
  for (const int listener : listeners_) polls.push_back({listener, POLLIN, 0});
  return polls;
}

void Watch::run() noexcept {
  try {
    for (;;) {
      std::vector<pollfd> waiting = polls();
      const bool doubts =
          std::any_of(controls_.begin(), controls_.end(), [](const Control& c) { return !c.socket; });
      if (::poll(waiting.data(), waiting.size(), doubts ? static_cast<int>(kDoubt.count()) : -1) < 0) {
        if (errno == EINTR) continue;
        throw_errno("poll of the watch thread");
      }
      // The doorbell comes first: a poison record names the root cause of the deaths that follow it. It is
      // drained before stopping_ is read, since stop() sets that before it rings: read the other way round, a
      // ring between the two would be swallowed and the thread would sleep for ever.
      on_doorbell();
      if (stopping_.load(std::memory_order_seq_cst)) {
        on_doorbell();  // what was told to this rank before stop()
        for (Control& control : controls_) drain(control);
        return;
      }
      const pollfd* next = waiting.data() + 1;
      for (size_t local = 0; local < pidfds_.size(); ++local) {
        if ((next++)->revents != 0) on_death(local);
      }
      for (Control& control : controls_) {
        if ((next++)->revents != 0) on_control(control);
      }
      std::erase_if(controls_, [this](Control& control) { return settle(control); });
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
  if (faults_.poisoned()) {
    faults_.raise_abort();
    tell_poison(faults_.record());
    if (!std::exchange(told_failure_, true)) on_failure_();
  }
  for (size_t local = 0; local < told_presence_.size(); ++local) {
    const int rank = topology_.local_ranks()[local];
    const Presence presence = faults_.presence(rank);
    if (presence != told_presence_[local]) {
      told_presence_[local] = presence;
      relay(presence == kLeft ? left_frame(rank) : dead_frame(rank));
    }
    const uint32_t version = block_.notice(rank).version.load(std::memory_order_acquire);
    if (version != told_notices_[local] && version % 2 == 0) {
      told_notices_[local] = version;
      relay(notice_frame(rank, faults_.notice(rank)));
    }
  }
  bool ask = false;
  {
    const std::lock_guard lock(asking_);
    ask = std::exchange(ask_, false);
  }
  if (ask) relay({ControlFrame::Type::kAsk, -1, {}, {}, {}});
}

void Watch::on_death(size_t local) {
  died_[local] = true;
  const int rank = topology_.local_ranks()[local];
  if (faults_.has_left(rank)) return;
  if (!faults_.poisoned()) {
    const Poison poison =
        faults_.failure_of(rank, "its process died", last_operation(static_cast<int>(local)));
    tell_poison(poison);
    faults_.poison(poison);
  }
  faults_.mark(rank, kDead);
}

void Watch::on_control(Control& control) {
  flush(control);
  uint8_t buffer[ControlFrame::kBytes];
  const ssize_t got =
      ::recv(control.socket.fd(), buffer, sizeof(buffer) - control.inbox.size(), MSG_DONTWAIT);
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (got <= 0) {
    control.how_it_ended = got == 0 ? "closed" : std::strerror(errno);
    control.ended_at = Clock::now();
    control.socket.close();
    return;
  }
  control.inbox.insert(control.inbox.end(), buffer, buffer + got);
  if (control.inbox.size() < ControlFrame::kBytes) return;
  const std::optional<ControlFrame> frame = decode_control_frame(control.inbox, topology_.size);
  control.inbox.clear();
  if (frame) return on_frame(control, *frame);
  faults_.poison_peer(control.peer, "it sent an invalid control frame", Descriptor{});
  control.ended_at = Clock::now();
  control.socket.close();
}

void Watch::on_frame(Control& control, const ControlFrame& frame) {
  switch (frame.type) {
    case ControlFrame::Type::kPoison:
      told_poison_ = true;  // its sender tells everyone
      faults_.poison(frame.poison);
      break;
    case ControlFrame::Type::kLeft:
      faults_.mark(frame.rank, kLeft);
      break;
    case ControlFrame::Type::kDead:
      faults_.mark(frame.rank, kDead);
      break;
    case ControlFrame::Type::kNotice:
      if (faults_.notice(frame.rank) != frame.notice) faults_.post_notice(frame.rank, frame.notice);
      break;
    case ControlFrame::Type::kAsk:
      for (int local = 0; local < topology_.local_size(); ++local) {
        tell(control,
             standing_frame(topology_.local_ranks()[static_cast<size_t>(local)], standing_of(local)));
      }
      break;
    case ControlFrame::Type::kStanding: {
      const std::lock_guard lock(asking_);
      heard_[frame.rank] = frame.standing;
      answered_.notify_all();
      break;
    }
  }
}

bool Watch::settle(Control& control) {
  if (control.socket) return false;
  if (faults_.has_left(control.peer)) return true;
  if (!faults_.poisoned()) {
    if (Clock::now() - control.ended_at < kDoubt) return false;
    const Poison poison = faults_.failure_of(
        control.peer, "its process died (control connection: " + control.how_it_ended + ")", Descriptor{});
    tell_poison(poison);
    faults_.poison(poison);
  }
  faults_.mark(control.peer, kDead);
  return true;
}

void Watch::tell(Control& control, const ControlFrame& frame) {
  if (!control.socket) return;
  const auto bytes = encode(frame);
  control.outbox.insert(control.outbox.end(), bytes.begin(), bytes.end());
  flush(control);
}

// What does not fit the socket's buffer follows when there is room. An error shows in the next receive.
void Watch::flush(Control& control) {
  if (!control.socket || control.outbox.empty()) return;
  const ssize_t sent =
      ::send(control.socket.fd(), control.outbox.data(), control.outbox.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  if (sent > 0) control.outbox.erase(control.outbox.begin(), control.outbox.begin() + sent);
}

void Watch::drain(Control& control) {
  const auto deadline = Clock::now() + kTellPatience;
  while (control.socket && !control.outbox.empty() && Clock::now() < deadline) {
    pollfd waiting{control.socket.fd(), POLLOUT, 0};
    if (::poll(&waiting, 1, 10) < 0 || (waiting.revents & (POLLERR | POLLHUP)) != 0) return;
    flush(control);
  }
}

void Watch::relay(const ControlFrame& frame) {
  for (Control& control : controls_) tell(control, frame);
}

void Watch::tell_poison(const Poison& poison) {
  if (!std::exchange(told_poison_, true)) relay(poison_frame(poison));
  const std::lock_guard lock(asking_);
  poison_told_ = true;
  answered_.notify_all();
}

void Watch::await_told() {
  raise_eventfd(faults_.doorbell_fd());
  std::unique_lock lock(asking_);
  answered_.wait_for(lock, kTellPatience, [this] { return poison_told_; });
}

std::vector<Standing> Watch::inquire() {
  std::vector<Standing> all(static_cast<size_t>(topology_.size));
  std::unique_lock lock(asking_);
  if (has_controls_) {
    heard_.clear();
    ask_ = true;
    raise_eventfd(faults_.doorbell_fd());
    const auto remote = static_cast<size_t>(topology_.size - topology_.local_size());
    answered_.wait_for(lock, kAskPatience, [&] { return heard_.size() == remote || faults_.poisoned(); });
    for (const auto& [rank, standing] : heard_) all[static_cast<size_t>(rank)] = standing;
  }
  for (int local = 0; local < topology_.local_size(); ++local) {
    all[static_cast<size_t>(topology_.local_ranks()[static_cast<size_t>(local)])] = standing_of(local);
  }
  return all;
}

Standing Watch::standing_of(int local) const {
  const bool stopped = local != topology_.local_index() && is_stopped(pidfds_[local].get());
  return {stopped ? Standing::State::kStopped : Standing::State::kAlive, last_operation(local)};
}

Descriptor Watch::last_operation(int local) const {
  const RankSlot& slot = block_.slot(local);
  return slot.descriptors[slot.arrived.value.load(std::memory_order_acquire) & 1];
}

}  // namespace mlsys::comm
