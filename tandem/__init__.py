"""What a user of Tandem imports: the vocabulary of requests, the client, the command line."""
