"""The server: recordings over HTTP, streams over a WebSocket, with the event names of OpenAI's interface. See docs/serving.md."""
