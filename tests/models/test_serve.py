"""`vtp-kernels serve`: what clients of transformers' server get is what generate() says."""

import base64
import gc
import http.client
import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_llava import tiny_llava
from tiny_processors import llava
from transformers import LlavaForConditionalGeneration

import vtp_kernels as vtp
from vtp_kernels import cli, demo
from vtp_kernels.chat import chat_inputs, greedy_answers

serve = pytest.importorskip("vtp_kernels.serve")
pytest.importorskip("fastapi")

METHOD = vtp.FastV(layer=2, keep=2)
QUESTIONS = ["w5 w6", "w7", "w8 w9 w10", "w11", "w12 w13"]
PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (56, 56, 3), np.uint8))
    for seed in range(len(QUESTIONS))
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    tiny_llava().save_pretrained(folder)
    llava().save_pretrained(folder)
    return folder


class Running:
    """A server in another thread, on a port that the system chose."""

    def __init__(self, checkpoint, method):
        self.server = serve.pruned_server(checkpoint, method, device="cpu")
        self.listening = serve.listener("127.0.0.1", 0)
        self.port = self.listening.getsockname()[1]
        self.thread = threading.Thread(
            target=self.server.run, kwargs={"sockets": [self.listening]}, daemon=True
        )

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        return self

    def __exit__(self, *error):
        self.server.should_exit = True
        self.thread.join()
        self.listening.close()

    def post(self, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(
            "POST", path, json.dumps(body or {}), {"content-type": "application/json"}
        )
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        assert response.status == 200, text
        return text

    def ask(self, picture, question):
        """A streamed answer, and in how many pieces it came."""
        file = io.BytesIO()
        picture.save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}]
        content += [{"type": "text", "text": question}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8}
        text = self.post("/v1/chat/completions", body | {"stream": True, "temperature": 0})
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
        deltas = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
        return "".join(filter(None, deltas)).strip(), sum(map(bool, deltas))

    def ask_all(self):
        with ThreadPoolExecutor(len(QUESTIONS)) as clients:
            return list(clients.map(self.ask, PICTURES, QUESTIONS))


def expected(method):
    """Of a model and a processor that never saw the server."""
    model, processor = tiny_llava(), llava()
    with demo.pruned(model, method):
        return [
            greedy_answers(model, processor, chat_inputs(processor, [picture], [question]), 8)[0]
            for picture, question in zip(PICTURES, QUESTIONS, strict=True)
        ]


def models_in_memory():
    gc.collect()
    return sum(issubclass(type(thing), LlavaForConditionalGeneration) for thing in gc.get_objects())


def test_five_clients_get_the_answers_of_the_pruned_model(checkpoint):
    pruned, dense = expected(METHOD), expected(None)
    assert pruned != dense  # else nothing would be shown
    with Running(checkpoint, METHOD) as running:
        answers = running.ask_all()
        assert [text for text, _ in answers] == pruned
        assert min(pieces for _, pieces in answers) > 1  # streamed
        loaded = models_in_memory()
        running.post("/reset")  # drops the model: it is loaded anew, and pruned again
        assert loaded - models_in_memory() == 1
        assert [text for text, _ in running.ask_all()] == pruned
        running.post("/load_model", {"model": str(checkpoint)})
        assert running.ask(PICTURES[0], QUESTIONS[0])[0] == pruned[0]
    with Running(checkpoint, None) as running:
        assert [text for text, _ in running.ask_all()] == dense


def test_a_server_that_starts_in_another_way_is_refused(checkpoint, monkeypatch):
    """transformers' own class, should it no longer call what the method is applied in."""
    from transformers.cli.serve import Serve

    original = Serve.__init__

    def blocking(self, *args, **options):
        monkeypatch.setattr("uvicorn.Server.run", lambda self: None)
        original(self, *args, **options | {"non_blocking": False})

    monkeypatch.setattr(Serve, "__init__", blocking)
    with pytest.raises(NotImplementedError, match="starts its server in another way"):
        serve.pruned_server(checkpoint, METHOD, device="cpu")


def test_what_is_wrong_is_one_line(checkpoint, tmp_path, capsys, monkeypatch):
    taken = serve.listener("127.0.0.1", 0)
    taken.listen()
    port = str(taken.getsockname()[1])
    weights = load_file(checkpoint / "model.safetensors")
    torn = tmp_path / "torn"
    torn.mkdir()
    for file in checkpoint.iterdir():
        (torn / file.name).write_bytes(file.read_bytes())
    weights.pop(next(name for name in weights if "layers.3.self_attn.q_proj" in name))
    save_file(weights, torn / "model.safetensors", metadata={"format": "pt"})
    given = {"--model": str(checkpoint), "--method": "fastv:2:0.5", "--port": "0"}
    for change, message in (
        ({"--port": port}, f"port: cannot listen on 127.0.0.1:{port}: "),
        ({"--host": "256.1.1.1"}, "port: cannot listen on 256.1.1.1:0: "),
        ({"--device": "nonsense"}, "device: 'nonsense' is not there"),
        ({"--method": "fastv:9:0.5"}, "there is no layer 9"),
        ({"--model": str(torn)}, "layers.3.self_attn.q_proj.weight; with random ones"),
    ):
        options = [part for pair in (given | change).items() for part in pair]
        assert cli.main(["serve", *options]) == 2
        lines = capsys.readouterr().err.splitlines()
        (line,) = [line for line in lines if line.startswith("vtp-kernels serve: ")]
        assert message in line
    taken.close()
    monkeypatch.setattr(serve, "PACKAGES", ("fastapi", "no_such_package"))
    assert cli.main(["serve", *(part for pair in given.items() for part in pair)]) == 2
    error = capsys.readouterr().err.strip()
    assert error == (
        'vtp-kernels serve: serving needs no_such_package: pip install "vtp_kernels[serve]"'
    )


def test_it_listens_on_this_machine_alone_unless_told_otherwise():
    parser = cli._parser()
    arguments = parser.parse_args(["serve", "--model", "m", "--method", "fastv"])
    assert (arguments.host, arguments.port) == ("127.0.0.1", 8000)
