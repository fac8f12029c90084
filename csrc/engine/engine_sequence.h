// A request in the engine and its completions: what the scheduler sees (Sequence) with the state of
// sampling and text beside it. Engine thread only.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/ngram_draft.h"
#include "core/sequence.h"
#include "engine/detokenizer.h"
#include "engine/request.h"
#include "engine/request_channel.h"
#include "engine/sampler.h"
#include "engine/stop_matcher.h"

namespace batchcore {

struct EngineRequest;

struct EngineSequence : Sequence {
  EngineSequence(EngineRequest& owner, const RequestSpec& spec, std::int32_t index,
                 const Vocab& vocab)
      : request(&owner),
        sampler(spec.sampling, index, vocab, spec.prompt),
        detokenizer(vocab),
        stops(spec.sampling.stop) {}

  EngineRequest* request;
  Sampler sampler;
  Detokenizer detokenizer;
  StopMatcher stops;
  CompletionDelta delta;       ///< gained since the last publish
  double last_token_s = -1.0;  ///< when it gained its last token, < 0 before the first
  bool is_finished = false;
  NgramIndex ngrams;        ///< of its tokens; empty where nothing is drafted
  bool is_suspect = false;  ///< was in a batch that failed: computed alone until that succeeds
  std::vector<std::uint8_t> saved_state;
};

struct EngineRequest {
  RequestId id = 0;
  RequestSpec spec;
  std::shared_ptr<RequestChannel> channel;
  std::vector<std::unique_ptr<EngineSequence>> sequences;  ///< by completion index
  std::shared_ptr<StaticBatch> batch;  ///< shared by its members, null where there is none
  std::int32_t num_unfinished = 0;
  UserId user = 0;
  double deadline = 0.0;        ///< on the engine's clock, infinity where there is none
  double queue_deadline = 0.0;  ///< to be admitted by; infinity where there is none
  bool was_admitted = false;
  bool has_news = false;  ///< is in the step's list of requests to publish
  std::exception_ptr error;
  RequestMetrics metrics;
};

}  // namespace batchcore
