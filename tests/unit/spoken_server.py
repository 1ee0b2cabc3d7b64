"""A server with OpenAI's interface on 127.0.0.1 that answers what it is told to, whatever it hears."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Asked:
    """One request: its headers, and its JSON as `body` or its form as `fields`."""

    def __init__(self, headers, data):
        self.headers, self.body, self.fields = headers, None, {}
        if headers["Content-Type"] == "application/json":
            self.body = json.loads(data)
            return
        border = b"--" + re.search("boundary=(.*)", headers["Content-Type"])[1].encode()
        for part in data.split(border)[1:-1]:
            head, _, value = part.partition(b"\r\n\r\n")
            self.fields[re.search(rb' name="(\w+)"', head)[1].decode()] = value.removesuffix(b"\r\n")

    def audio(self):
        part = next(part for turn in self.body["messages"] for part in turn["content"] if part["type"] == "input_audio")
        return base64.b64decode(part["input_audio"]["data"])


class SpokenServer:
    """Serves until left; an answer is a text, or a code of HTTP."""

    def __init__(self, *answers):
        self.asked, answers = [], list(answers)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self._send(200, {"data": []})

            def do_POST(self):
                outer.asked.append(Asked(self.headers, self.rfile.read(int(self.headers["Content-Length"]))))
                answer = answers.pop(0)
                if isinstance(answer, int):
                    self._send(answer, {"error": "as told"})
                elif self.path.endswith("/audio/transcriptions"):
                    self._send(200, {"text": answer})
                else:
                    choice = {"message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
                    self._send(200, {"choices": [choice], "usage": {"completion_tokens": 3}})

            def _send(self, code, value):
                data = json.dumps(value).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

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
