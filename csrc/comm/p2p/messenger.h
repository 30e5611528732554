// Point-to-point messages: one progress thread, started by the first message in or out.
//
// A sender calls the receiver (by unix socket inside a host, by TCP between hosts), and messages of that
// direction go over that connection, so the two directions of a pair never wait for each other. A small
// message is sent at once and kept by the receiver until somebody asks; the send is complete when the kernel
// has taken it. A large one is announced, and moves when a receive has been posted for it: inside a host the
// receiver copies it out of the sender's arena or process, between hosts it follows on the connection. Its
// send is complete when the receiver has it.
//
// Where the binding brought a carrier along, it moves the payload between hosts, and the connections only say
// what is coming, in the order in which it comes.
#pragma once

#include <poll.h>

#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "comm/auth/acceptor.h"
#include "comm/bringup/links.h"
#include "comm/p2p/mailbox.h"
#include "comm/p2p/request.h"

namespace mlsys::comm {

class Messenger {
 public:
  // `links` connects when that has not happened yet; it is called on the progress thread, so that sending and
  // receiving never wait for other ranks.
  Messenger(const Options& options, std::function<Links&()> links);
  ~Messenger() { stop(); }

  std::shared_ptr<Request> send(const void* data, size_t bytes, int destination, uint64_t tag);
  std::shared_ptr<Request> receive(void* data, size_t bytes, int source, uint64_t tag);
  // Starts the thread if it does not run: somebody wants to deliver a message.
  void start();
  // Ends what is pending with an error and joins. Idempotent.
  void stop();

  uint64_t tcp_bytes_sent() const { return tcp_sent_.load(std::memory_order_relaxed); }
  uint64_t tcp_bytes_received() const { return tcp_received_.load(std::memory_order_relaxed); }
  void count_carried(Counters* counters) const;
  uint64_t local_bytes_received() const { return local_received_.load(std::memory_order_relaxed); }

 private:
  // A frame to be sent; `state` is the message whose payload follows it, if any.
  struct Job {
    MessageHeader header;
    std::shared_ptr<MessageState> state;
    bool with_payload() const {
      return header.kind == MessageHeader::Kind::kEager || header.kind == MessageHeader::Kind::kPayload;
    }
  };
  // Messages to one destination.
  struct Outbound {
    std::deque<Job> queue;
    std::map<uint64_t, std::shared_ptr<MessageState>> offered;  // not yet taken
    uint64_t num_offers = 0;
    std::unique_ptr<Handshake> handshake;
    int num_calls = 0;  // that broke off
    Socket socket;
    size_t moved = 0;  // bytes of the first job, its header included
    std::vector<uint8_t> reply;
    std::string failure;
    std::chrono::steady_clock::time_point failed_at;
    // Payloads go by the carrier. A broken connection is then not made anew: nobody knows how many of those
    // that it announced have been carried.
    bool carried = false;
    size_t num_carried = 0;  // under way
    bool waiting() const { return !queue.empty() || !offered.empty() || num_carried != 0; }
  };
  // Messages from one source.
  struct Source {
    int peer;
    uint64_t connection;
    Socket socket;
    std::vector<uint8_t> header;
    std::shared_ptr<Inbound> message;                     // whose payload comes now
    std::map<uint64_t, std::shared_ptr<Inbound>> offers;  // not yet taken
    std::deque<std::pair<std::shared_ptr<Inbound>, MessageHeader>> fetching;
    std::vector<uint8_t> replies;
    std::string failure;  // why the connection ended with messages under way
    std::chrono::steady_clock::time_point failed_at;
    size_t num_carried = 0;  // payloads on their way by the carrier
    bool waiting() const { return message != nullptr || !offers.empty() || num_carried != 0; }
  };
  // A payload in the carrier's hands, under the carrier's number for it.
  struct Carried {
    int peer;
    std::shared_ptr<MessageState> lent;  // whose memory it is, if anybody's
    size_t pieces_left;
    std::shared_ptr<Inbound> incoming = nullptr;  // null when sending
    uint64_t connection = 0;                      // that announced it
  };

  std::shared_ptr<Request> enqueue(std::shared_ptr<MessageState> state);
  void run() noexcept;
  void serve(Links& links);
  std::vector<pollfd> polls(Links& links) const;
  // How long the progress thread may sleep.
  int patience_ms() const;
  // carried.cpp
  bool carries(Links& links, int peer) const { return carrier_ != nullptr && !links.topology.is_local(peer); }
  void carry_out(int destination, Outbound& outbound, const std::shared_ptr<MessageState>& state);
  void carry_in(Source& source, const std::shared_ptr<Inbound>& message);
  void move_carried(Links& links);
  void end_carried(Source& source, const std::exception_ptr& error);
  void end_carried(int destination, Outbound& outbound, const std::exception_ptr& error);

  // outbound.cpp
  bool call(Links& links, int destination, Outbound& outbound);
  void break_outbound(Outbound& outbound, std::string why);
  void push(Links& links, int destination, Outbound& outbound);
  void read_replies(Links& links, int destination, Outbound& outbound);
  void on_reply(Links& links, int destination, Outbound& outbound, const MessageHeader& reply);

  // inbound.cpp; those that return a bool: false when the connection has ended.
  bool pull(Links& links, Source& source);
  bool on_header(Source& source, const MessageHeader& header);
  void answer_claims();
  void reply(Source& source, MessageHeader::Kind kind, uint64_t id);
  bool fetch(Links& links, Source& source);
  bool end_source(Links& links, Source& source, const std::string& why);
  static bool break_source(Source& source, std::string why);
  bool judge_source(Links& links, Source& source);
  static bool flush_replies(Source& source);
  void end_hopeless(Links& links);
  void end_everything(std::exception_ptr error);
  void flush_ended();
  std::exception_ptr peer_failed(Links& links, int peer, const std::string& cause) const;

  // How long a broken connection waits for the watch thread to name the reason, which it knows better: the
  // end of a neighbour may be a consequence of another rank's failure.
  static constexpr std::chrono::milliseconds kGrace{300};

  const Options options_;
  const std::function<Links&()> connect_;
  const UniqueFd wake_;
  // Guards everything down to broken_ but the informant. Shared with the requests, which may outlive this
  // object.
  const std::shared_ptr<std::mutex> mutex_ = std::make_shared<std::mutex>();
  const std::shared_ptr<Informant> informant_ = std::make_shared<Informant>();
  bool started_ = false;
  bool stopping_ = false;
  std::map<int, Outbound> outbound_;
  std::vector<Source> sources_;
  uint64_t num_connections_ = 0;
  Mailbox mailbox_;
  std::vector<Ended> ended_;          // sends; the mailbox has its own
  std::shared_ptr<Carrier> carrier_;  // null: the connections carry it
  std::map<uint32_t, Carried> carried_;
  uint32_t num_carried_ = 0;
  std::vector<uint32_t> completed_;  // scratch of move_carried()
  std::exception_ptr broken_;
  std::vector<Acceptor> acceptors_;  // used by the progress thread only
  std::atomic<uint64_t> tcp_sent_{0}, tcp_received_{0}, local_received_{0};
  pid_t owner_ = 0;
  std::thread thread_;
};

}  // namespace mlsys::comm
