"""A gateway that only says that it is well, on the listening socket that it inherits."""

import http.server
import os
import signal
import socket
import sys


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = str(os.getpid()).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(http.server.HTTPServer):
    def __init__(self, fd):
        super().__init__(("", 0), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = socket.socket(fileno=fd)
        self.socket.setblocking(True)


signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
Server(int(sys.argv[1])).serve_forever()
