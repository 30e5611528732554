// The watch thread of one communicator: the first to know when a process dies.
//
// It sleeps in poll() on a pidfd of every local peer, on this rank's doorbell and, on a host's leader, on one
// control connection to each other host's leader, and on the listeners for messages, so that a sender is
// served even by a rank that never sent or received anything itself. A death is written into the control
// block, which all local waits poll, and relayed to the other hosts; a frame from another host is written
// here.
#pragma once

#include <poll.h>

#include <atomic>
#include <functional>
#include <map>
#include <thread>
#include <vector>

#include "comm/fault/control_frame.h"
#include "comm/fault/faults.h"
#include "comm/transport/socket.h"

namespace mlsys::comm {

class Watch {
 public:
  // `pidfds` by local index (this rank's own is ignored); `controls` by group rank of the remote leader.
  // `on_caller` is called once, when one of `listeners` is called for the first time.
  Watch(const Topology& topology, const ControlBlock& block, const Faults& faults,
        std::vector<UniqueFd> pidfds, std::map<int, Socket> controls, std::vector<int> listeners,
        std::function<void()> on_caller);
  ~Watch() { stop(); }

  // Relays what is still to be told, then joins. Idempotent. In a forked child, where the thread does not
  // exist, it only lets go of it.
  void stop();

 private:
  struct Control {
    int leader;
    Socket socket;
    std::vector<uint8_t> inbox;
  };

  void run() noexcept;
  void on_doorbell();
  void on_death(size_t local);
  std::vector<pollfd> polls() const;
  // False when the connection is finished.
  bool on_control(Control& control);
  void relay(const ControlFrame& frame);
  Descriptor last_operation(int rank) const;

  const Topology& topology_;
  const ControlBlock& block_;
  const Faults& faults_;
  std::vector<UniqueFd> pidfds_;
  std::vector<Control> controls_;
  std::vector<int> listeners_;
  std::function<void()> on_caller_;
  std::vector<bool> told_left_;
  bool told_poison_ = false;
  std::atomic<bool> stopping_{false};
  pid_t owner_;
  std::thread thread_;
};

}  // namespace mlsys::comm
