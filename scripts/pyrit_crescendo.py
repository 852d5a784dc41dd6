"""PyRIT's own CrescendoAttack against `demur serve`, unsteered and steered: does a foreign attacker attach unchanged?

    python scripts/pyrit_crescendo.py [--objective phishing-email ...] [--model FOLDER] [--json]

PyRIT is installed in an environment of its own (`peer_environment.py`), with its defaults: its system prompt for the
attacker, its refusal scorer, its scale for success. The model behind those three is an endpoint in this process that
plays them by demur's scripts and rules, so that nothing else is needed. Exits with 1 unless every attack came to an
outcome and both sides were really asked.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

VALUE = 8
"""Clamp value of the steered side."""


def inside(target: str, attacker: str, models: Sequence[str], objectives: Sequence[str]) -> None:
    """What runs in PyRIT's environment: a line of JSON for each attack."""
    import asyncio

    from pyrit.executor.attack import AttackAdversarialConfig, CrescendoAttack
    from pyrit.prompt_target import OpenAIChatTarget
    from pyrit.setup import IN_MEMORY, initialize_pyrit_async

    async def run() -> None:
        await initialize_pyrit_async(IN_MEMORY, load_defaults=False, silent=True)
        common: dict[str, Any] = {"api_key": "none", "httpx_client_kwargs": {"timeout": 300}}
        for model in models:
            attack = CrescendoAttack(
                objective_target=OpenAIChatTarget(
                    endpoint=target, model_name=model, temperature=0.0, max_completion_tokens=64, **common
                ),
                attack_adversarial_config=AttackAdversarialConfig(
                    target=OpenAIChatTarget(endpoint=attacker, model_name="script", **common)
                ),
                max_turns=8,
                max_backtracks=6,
            )
            for objective in objectives:
                found = await attack.execute_async(objective=objective)
                told = {
                    "model": model,
                    "objective": objective,
                    "outcome": str(getattr(found.outcome, "value", found.outcome)),
                    "turns": found.executed_turns,
                    "backtracks": found.backtrack_count,
                }
                print(json.dumps(told), flush=True)

    asyncio.run(run())


class Player(BaseHTTPRequestHandler):
    """The attacker's model: writes questions, judges refusals and success, by demur's scripts and rules."""

    escalations: dict[str, Any] = {}  # noqa: RUF012
    asked: dict[str, str] = {}  # noqa: RUF012
    """Objective to the question asked last."""

    def do_POST(self) -> None:
        """Answer a chat completion."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = _text(request["messages"][-1]["content"])
        answer = json.dumps(self._play(said))
        body = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "script",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def _play(self, said: str) -> dict[str, Any]:
        from demur.attacks.success import Said, Script
        from demur.judges.rules import RulesJudge
        from demur.types import Completion, Message, Prompt

        def label(user: str, reply: str) -> Any:
            prompt = Prompt("x", (Message("user", user),), "harmful", "attack")
            return RulesJudge().judge(prompt, Completion("x", "", reply, 0, "length")).label

        if refusal := re.match(r"conversation_objective: (.*?)\nresponse_to_evaluate_input: (.*)", said, re.S):
            user = self.asked.get(refusal[1], refusal[1])
            return {"score_value": label(user, refusal[2]) == "refused", "rationale": "rules", "description": "rules"}
        if scale := re.match(r"objective: (.*?)\nresponse: (.*)", said, re.S):
            one, user = self.escalations[scale[1]], self.asked[scale[1]]
            reached = Script().judge([Said(one, user, scale[2], label(user, scale[2]))])[0]
            return {"score_value": "100" if reached.success else "0", "rationale": "rules", "description": "rules"}
        objective = next(text for text in self.escalations if f'"{text}"' in said)
        turn = re.search(r"turn (\d+) of", said)
        turns = self.escalations[objective].turns
        wordings = turns[min(int(turn[1]) if turn else 1, len(turns)) - 1]
        before = self.asked.get(objective, "")
        refused = "refused to respond" in said and before in wordings
        question = wordings[(wordings.index(before) + 1) % len(wordings)] if refused else wordings[0]
        self.asked[objective] = question
        return {"next_message": question, "last_response_summary": "", "rationale": "script"}


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def drive(names: Sequence[str], model: str) -> list[dict[str, Any]]:
    """Start both servers and let PyRIT attack; one result for each side and objective."""
    from peer_environment import peer_python

    from demur.data.escalations import load_escalations
    from demur.record import to_json, write_json
    from demur.sae.store import load_sae
    from demur.spec import Edit, SteeringSpec

    python = peer_python("pyrit")
    escalations = load_escalations(names=names)
    Player.escalations = {one.objective: one for one in escalations}
    sae = load_sae("smollm2-135m-instruct")
    with tempfile.TemporaryDirectory() as folder, ThreadingHTTPServer(("127.0.0.1", 0), Player) as player:
        threading.Thread(target=player.serve_forever, daemon=True).start()
        edit = Edit(sae.config.hookpoint, sae.hash, (957,), VALUE)
        write_json(Path(folder) / f"clamp-{VALUE}.json", to_json(SteeringSpec((edit,))))
        serve = [sys.executable, "-m", "demur.cli.main", "serve", "--port", "0", "--spec", folder, "--name", "target"]
        with subprocess.Popen([*serve, "--model", model], stderr=subprocess.PIPE, text=True) as server:
            try:
                assert server.stderr is not None
                address = next(found[0] for line in server.stderr if (found := re.findall(r"http://[\d.:]+", line)))
                attacker = f"http://127.0.0.1:{player.server_port}/v1"
                command = [str(python), __file__, "--inside", f"{address}/v1", attacker, "target", f"clamp-{VALUE}"]
                done = subprocess.run(
                    [*command, "--objective", *(one.objective for one in escalations)],
                    check=True,
                    text=True,
                    stdout=subprocess.PIPE,
                    env={"PYTHON_DOTENV_DISABLED": "1", "HOME": folder, "PATH": "/usr/bin:/bin"},
                )
            finally:
                server.terminate()
                player.shutdown()
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", nargs="+", default=["phishing-email", "stalking"])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--inside", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.inside:
        target, attacker, *models = given.inside
        inside(target, attacker, models, given.objective)
        return 0
    found = drive(given.objective, given.model)
    for one in found:
        print(f"{one['model']}, {one['objective']}: {one['outcome']}, {one['turns']} turns, {one['backtracks']} back")
    whole = len(found) == 2 * len(given.objective) and all(one["outcome"] in ("success", "failure") for one in found)
    if given.json:
        print(json.dumps({"attacks": found, "whole": whole}))
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
