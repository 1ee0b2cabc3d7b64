"""A chat server on 127.0.0.1 that answers as a test tells it to."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def by_length(phrases):
    """What it answers by default: phrases of three characters and more are names."""
    return str([number for number, phrase in enumerate(phrases, 1) if len(phrase) > 2])


class ChatServer:
    """Serves until left. `requests` holds (headers, body, phrases) of each; `answers` gives the next ones, then `by_length` does.

    An answer is a text, a function of the phrases, an HTTP code, or an exception class, which cuts the connection.
    """

    def __init__(self, *answers):
        self.requests, self.answers = [], list(answers)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                phrases = re.findall(r"^\d+\. (.*)$", body["messages"][-1]["content"], flags=re.MULTILINE)
                outer.requests.append((dict(self.headers), self.path, body, phrases))
                answer = outer.answers.pop(0) if outer.answers else by_length
                if isinstance(answer, type):
                    return  # nothing is sent: the connection ends
                if isinstance(answer, int):
                    self.send_error(answer)
                    return
                text = answer(phrases) if callable(answer) else answer
                reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
                try:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(reply)))
                    self.end_headers()
                    self.wfile.write(reply)
                except ConnectionError:
                    outer.requests.append("left alone")  # the client did not wait

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
