// The watch thread of one rank: notices deaths, spreads the poison between hosts, and answers and asks what
// everybody is doing when an operation has timed out.
//
// It holds a pidfd of every local rank and a control connection to at least one rank of every other host, so
// that each rank of one host is heard directly by somebody on each other host, whoever else has left. A death
// or a poison record is told to the other hosts before the ranks of this one can see it: a survivor that
// raises and ends at once is then not taken for the culprit elsewhere.
//
// The thread also looks after the message listeners until somebody calls, so that a rank which never sends or
// receives itself still has no thread for it.
#pragma once

#include <poll.h>
#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "comm/fault/control_frame.h"
#include "comm/fault/faults.h"
#include "comm/transport/socket.h"

namespace mlsys::comm {

class Watch {
 public:
  // `pidfds` are ordered by local index; `controls` are connections to ranks of other hosts. `on_caller` is
  // called once, when one of `listeners` is called for the first time; `on_failure` when the poison record is
  // there.
  Watch(const Topology& topology, const ControlBlock& block, const Faults& faults,
        std::vector<UniqueFd> pidfds, std::map<int, Socket> controls, std::vector<int> listeners,
        std::function<void()> on_caller, std::function<void()> on_failure);
  ~Watch() { stop(); }

  // Relays what is still to be told, then joins. Idempotent. In a forked child, where the thread does not
  // exist, it only lets go of it.
  void stop();

  // Returns when the poison record, which must be there, has been handed to the other hosts' sockets, or
  // after a short while: a rank that fails may end its process right after.
  void await_told();

 private:
  using Clock = std::chrono::steady_clock;
  struct Control {
    int peer;
    Socket socket;
    std::vector<uint8_t> inbox, outbox;
    Clock::time_point ended_at{};  // when not zero: the connection is gone, and the verdict is still open
    std::string how_it_ended;
  };

  void run() noexcept;
  std::vector<pollfd> polls() const;
  void on_doorbell();
  void on_death(size_t local);
  void on_control(Control& control);
  void on_frame(Control& control, const ControlFrame& frame);
  // True when the connection is finished and its end has been judged.
  bool settle(Control& control);
  void tell(Control& control, const ControlFrame& frame);
  static void flush(Control& control);
  // Gives what is left a short while to get away.
  static void drain(Control& control);
  void relay(const ControlFrame& frame);
  void tell_poison(const Poison& poison);
  std::vector<Standing> inquire();
  Standing standing_of(int local) const;
  Descriptor last_operation(int local) const;

  const Topology& topology_;
  const ControlBlock& block_;
  const Faults& faults_;
  std::vector<UniqueFd> pidfds_;
  std::vector<bool> died_;  // by local index: no longer polled
  std::vector<Control> controls_;
  std::vector<int> listeners_;
  std::function<void()> on_caller_;
  std::function<void()> on_failure_;
  std::vector<Presence> told_presence_;  // by local index
  std::vector<uint32_t> told_notices_;   // versions, by local index
  bool told_poison_ = false;
  bool told_failure_ = false;
  std::atomic<bool> stopping_{false};
  const bool has_controls_;
  std::mutex asking_;  // guards the rest, but for the thread
  std::condition_variable answered_;
  bool ask_ = false;
  bool poison_told_ = false;
  std::map<int, Standing> heard_;  // of ranks of other hosts, since the last question
  pid_t owner_;
  std::thread thread_;
};

}  // namespace mlsys::comm
