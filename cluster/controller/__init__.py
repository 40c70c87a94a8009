"""The online controller: load in, what is wanted out; and the hand that carries it out."""
