"""Pure: speculative decoding: who guesses tokens, how many are worth guessing, and which guesses hold."""
