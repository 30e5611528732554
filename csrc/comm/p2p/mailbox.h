// Matches messages to receives by (source, tag): no threads, no sockets.
//
// Messages of one source and tag are matched in the order in which they arrive, receives in the order in
// which they were posted. A message that nobody has asked for yet is kept ("unexpected") until somebody does.
#pragma once

#include <functional>
#include <list>
#include <memory>
#include <utility>
#include <vector>

#include "comm/p2p/message.h"

namespace mlsys::comm {

// A message on its way in. The payload of a small one goes straight into the receive that claimed it before
// it started, else into `kept`, from where a later receive copies it. A large one is only offered: its
// payload stays with the sender until a receive has claimed it.
struct Inbound {
  int source = -1;
  uint64_t tag = 0;
  size_t bytes = 0;
  size_t received = 0;
  bool direct = false;
  bool offered = false;
  uint64_t connection = 0;  // by which an offer came, and its number there
  uint64_t id = 0;
  std::vector<std::byte> kept;
  std::shared_ptr<MessageState> receive;
};

// A state together with how it ended; completed by the messenger once it holds no lock.
struct Ended {
  std::shared_ptr<MessageState> state;
  int source;
  std::exception_ptr error;
};

class Mailbox {
 public:
  // `name` turns a group rank into the rank that messages name.
  explicit Mailbox(int rank, std::function<int(int)> name) : rank_(rank), name_(std::move(name)) {}

  void post(std::shared_ptr<MessageState> receive);
  std::shared_ptr<Inbound> begin(int source, const MessageHeader& header);
  // The same for a message whose payload is only to come when take_claimed() has named it.
  std::shared_ptr<Inbound> offer(int source, const MessageHeader& header, uint64_t connection);
  // Offers that a receive has claimed since the last call. Without a receive: of another size than was asked
  // for, so that nobody wants the payload.
  std::vector<std::shared_ptr<Inbound>> take_claimed() { return std::exchange(claimed_, {}); }
  // Where the next bytes of the message go, at most `wanted` of them.
  std::span<std::byte> room(Inbound& message, size_t wanted);
  void advance(const std::shared_ptr<Inbound>& message, size_t bytes);

  // Drops a message whose sender went away halfway; a receive that had claimed it ends with `error`.
  void break_off(const std::shared_ptr<Inbound>& message, std::exception_ptr error);
  // Ends the posted receives for which `hopeless` returns an error.
  void end_if(const std::function<std::exception_ptr(const MessageState&)>& hopeless);
  void end_all(std::exception_ptr error);

  bool waiting() const { return !posted_.empty(); }
  std::vector<Ended> take_ended() { return std::exchange(ended_, {}); }

 private:
  static bool matches(const MessageState& receive, int source, uint64_t tag) {
    return receive.tag == tag && (receive.peer == source || receive.peer == Communicator::kAnySource);
  }
  // Gives the message to the receive that was posted for it, or keeps it for a later one.
  void match(const std::shared_ptr<Inbound>& message);
  bool size_fits(const std::shared_ptr<MessageState>& receive, const Inbound& message);
  void deliver(const Inbound& message);

  int rank_;
  std::function<int(int)> name_;
  std::list<std::shared_ptr<MessageState>> posted_;
  std::list<std::shared_ptr<Inbound>> unexpected_;  // not claimed yet
  std::vector<std::shared_ptr<Inbound>> claimed_;
  std::vector<std::byte> discarded_;
  std::vector<Ended> ended_;
};

}  // namespace mlsys::comm
