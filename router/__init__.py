"""The front door: gRPC and OpenAI HTTP, admission, dispatch, sessions, SLO accounting."""
