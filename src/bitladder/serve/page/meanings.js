// What heads of columns and verdicts mean, in a phrase each. The report's meanings.py has the same.

export const HEADS = {
  level: "how the weights are stored; see bitladder explain NAME",
  file: "size on disk",
  bpw: "bits per weight, scales included",
  "on label": "weights stored in the type that the name says; the others got more bits, or do not divide that way",
  memory: "weights, cache of the context and buffers while it runs",
  "tokens/s": "tokens per second while answering, one request at a time",
  KL: "how far its next-token probabilities are from the source's, in nats per token; 0 is identical",
  "ppl ratio": "perplexity over the source's on the same text; 1.02 is 2% worse at predicting it",
  "top-1": "how often it finds the same next token most likely as the source does",
  passes: "inputs of the workload whose answer met its criteria",
  cost: "of a million answer tokens, in the currency of your prices, and what is saved beside the reference",
  verdict: "what becomes of the level under the bar",
};
export const VERDICTS = {
  reference: "what the others are compared with",
  "quality tier": "chosen where quality counts",
  "speed tier": "chosen where speed counts",
  "both tiers": "chosen for quality and for speed",
  "meets the bar": "good enough; another level was the better choice",
  "fails the bar": "measured, and not good enough for the bar",
  "cannot tell": "too little was measured to say; the reason names what is missing",
  "does not fit": "larger than the memory there is at this context",
};
export const LOSSES = {
  "not told from zero": "no loss seen",
  measurable: "a measurable loss",
  "known bad": "known to be worse",
};
