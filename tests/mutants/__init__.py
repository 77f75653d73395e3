"""Named lines of fastconv, what each becomes when it is broken, and the tests that must see it; `__main__` runs them."""

from __future__ import annotations

from dataclasses import dataclass

REPLIES, MEMORY, DISK, SECRETS = (
    f"tests/faults/test_{n}.py" for n in ("judge_replies", "memory", "disk_and_ledger", "secrets")
)
WHOLE, INPUTS, CONTENT = (f"tests/faults/test_{name}.py" for name in ("whole_run", "hostile_inputs", "odd_content"))
LIVE, BATCHES, LOCAL, DESK, REQUEST = (
    f"tests/judge/test_{name}.py" for name in ("live", "batches", "local", "desk", "request")
)
SERVE, HOSTILE, VLLM = (f"tests/serve/test_{name}.py" for name in ("serve", "hostile", "vllm"))
TRAIN, CHAT, LOCATE = "tests/engine/test_train.py", "tests/test_chat.py", "tests/engine/test_locate.py"
SAME_BITS, RECIPE = "tests/engine/test_same_bits.py", "tests/test_recipe.py"


@dataclass(frozen=True)
class Mutant:
    """`old` in `file` becomes `new`; `tests` (a file, and words of `-k`) must then fail."""

    file: str
    old: str
    new: str
    tests: str
    words: str


def _of(file: str, tests: str, *lines: tuple[str, str, str]) -> list[Mutant]:
    return [Mutant(f"fastconv/{file}", old, new, tests, words) for old, new, words in lines]


MUTANTS = [
    *_of(
        "judge/http.py", REPLIES,
        ("if is_loopback(host) or not has_key:", "if True:", "key_goes_where"),
        ('    if scheme != "https":\n', '    if scheme == "gopher":\n', "key_goes_where"),
        ("or not host or url.userinfo:", "or not host:", "key_goes_where"),
        ("if host not in {httpx2.URL(own).host, *named} and", "if host not in {host} and", "key_goes_where"),
        ('and f"{host}:{url.port or 443}" not in named:', "and False:", "key_goes_where"),
        ("timeout=timeout_s, follow_redirects=False, trust_env=not is_loopback(base.host),",
         "timeout=timeout_s, follow_redirects=True, trust_env=not is_loopback(base.host),", "within_the_host"),
        ("timeout=timeout_s, follow_redirects=False, trust_env=not is_loopback(base.host),",
         "timeout=timeout_s, follow_redirects=False, trust_env=True,", "asked_directly"),
        ("    direct = is_loopback(base.host)\n", "    direct = False\n", "asked_directly"),
        ("    if origin not in (", "    if False and origin not in (", "results_of_a_batch"),
        ("        _require_plain(response)\n", "", "packed"),
        ('"response": [_require_plain]}', '"response": []}', "packed"),
        ("                if self._left < 0:\n", "                if False:\n", "body_without_end"),
        ("    return min(wait_s, MAX_WAIT_S) if", "    return wait_s if", "local_judge_refuses"),
        ("    if found is None and response.is_success:\n", "    if False:\n", "login_page_is_no"),
    ),
    *_of(
        "judge/claude.py", REPLIES,
        ("    cost = min(cost_usd(usage, price, factor), worst) if usage else worst\n",
         "    cost = cost_usd(usage, price, factor)\n", "booked or any_reply"),
        ("    absurd = any(not 0 <= n <= MAX_USAGE_TOK for n in counts.values())\n", "    absurd = False\n", "booked or any_reply"),
        ('message.get("type") != "message"', "False", "no_message"),
        ("raise Outage(problem, taken=not is_page)", "raise Outage(problem)", "no_message"),
    ),
    *_of("judge/claude.py", LIVE, ("taken=not isinstance(error, APIStatusError)", "taken=False", "storm_of_faults")),
    *_of(
        "judge/desk.py", REPLIES,
        ("                for task in done:\n                    task.result()\n", "                pass\n", "writer_that_fails"),
    ),
    *_of(
        "judge/desk.py", LIVE,
        ('            self._ledger.apply([Unpaid(ticket, "lost" if is_lost else "refused")])\n', "", "alone"),
        ('"lost" if is_lost else "refused"', '"refused"', "storm_of_faults"),
        ("            before.append(reply)\n        else:", "            pass\n        else:", "stays_unreadable"),
        ("if n_tries >= TRIES or outage.wait_s > LONG_WAIT_S:", "if n_tries >= TRIES:", "long_wait"),
        ("await asyncio.sleep(max(outage.wait_s, min(", "await asyncio.sleep(max(0.0, min(", "no_sooner"),
    ),
    *_of(
        "judge/batches.py", BATCHES,
        ("            if isinstance(error, Outage) and error.taken:\n", "            if False:\n", "taken"),
        ("            n_open += 1\n", "            pass\n", "not_known_whether"),
    ),
    *_of("judge/claude.py", BATCHES, ('"status_code", 500) >= 500', '"status_code", 500) >= 501', "taken")),
    *_of(
        "judge/request.py", DESK,
        ('self._waits.setdefault(stage, set()).add("")', "self._waits.setdefault(stage, set())", "not_finished_before"),
        ("if self.open.pop(judgement.key, None) is not None:", "if True:", "resident or another"),
    ),
    *_of(
        "judge/rubric.py", REPLIES,
        ("return ParsedReply(values, safe_value(answer))", "return ParsedReply(values, answer)", "cannot_be_stored"),
    ),
    *_of("judge/rubric.py", REQUEST, (", parse_float=_finite)", ")", "is_finite")),
    *_of(
        "judge/local.py", LOCAL,
        ("        if read is None:\n            raise", "        if False:\n            raise", "no_completion"),
        ("if n_unread > 1 else None", "if n_unread > 2 else None", "once_more"),
    ),
    *_of(
        "judge/local.py", DESK,
        ("            return replace(reply, fault=PART), None\n", "            return reply, None\n", "died or resident"),
        ("            except (Outage, JudgeError) as error:\n", "            except Outage as error:\n", "without_memory"),
    ),
    *_of(
        "errors.py", DISK,
        ("c if c.isprintable() else", "c if True else", "what_is_shown"),
        ('_LONE_SURROGATE.sub("\\ufffd", text[:max_chars])', "text[:max_chars]", "what_is_shown"),
        ("self.what = what = shown(what)", "self.what = what", "what_is_shown"),
    ),
    *_of(
        "store/io.py", DISK,
        ("            os.fsync(file.fileno())\n", "            pass\n", "synced"),
        ("    sync_folder(path.parent)\n", "    pass\n", "synced"),
        ("        sync_folder(folder.parent)\n", "        pass\n", "synced"),
        ("        temporary.unlink(missing_ok=True)\n", "        pass\n", "fault_at_any_step"),
        ("    except (ValueError, TypeError, RecursionError):\n        raise damaged", "    except KeyError:\n        raise damaged",
         "holds_no_json"),
    ),
    *_of("store/sound.py", DISK, ("if is_required or place_in_key else", "if is_required else", "passes_over")),
    *_of("store/io.py", DISK, ("    if found := db.execute(f\"SELECT type, name", "    if False and db.execute(f\"SELECT type, name", "would_run")),
    *_of("store/sound.py", DISK, ("isinstance(value, bool) and abs(value) < 1e300", "isinstance(value, bool)", "no_fastconv_wrote")),
    *_of("store/sound.py", CONTENT, ("key_of(kind, version, inputs) == key and given", "given", "content_that_cannot_be")),
    *_of("store/ledger.py", CONTENT, ("        require_artefact(sha256, suffix, str(self.root))\n", "", "no_other_file")),
    *_of("analysis/scores.py", CONTENT, ("        _require_on_scale(stage.slot, scores.values, unit)\n", "", "content_that_cannot_be")),
    *_of("engine/shapes.py", CONTENT, ("if not 1 <= number <= most:", "if not number <= most:", "size_of_a_config")),
    *_of("recipe/settings.py", CONTENT, ("abs(one) > 2**64", "False", "integer_without_end")),
    *_of("store/gc.py", DISK, ("if held and one not in held", "if False", "passes_over")),
    *_of("store/merge.py", DISK, ("    if not found:  # SQLite", "    if False:  # SQLite", "no_fastconv_wrote")),
    *_of(
        "store/io.py", REPLIES,
        ("    except (OverflowError, UnicodeEncodeError) as error:\n", "    except KeyError as error:\n", "sqlite_cannot_hold"),
    ),
    *_of(
        "store/io.py", SECRETS,
        ("and not _SECRET & set(", "and not set() & set(", "child"),
        ("        if name.startswith(_PASSED_ON) and", "        if", "child"),
    ),
    *_of("cluster/__init__.py", SECRETS, ("for name in names & os.environ.keys()}", "for name in ()}", "ray")),
    *_of(
        "store/ledger.py", DISK,
        ("            if not path.is_file():  #", "            if not path.exists():  #", "no_file"),
        ("            if path.is_file() and not path.stat().st_size and", "            if False and", "doctor_says"),
    ),
    *_of(
        "store/gc.py", DISK,
        ('[f"the ledger is damaged: {line}" for line in said if line != "ok"]', "[]", "passes_over"),
        ("        elif deep:\n", "        elif False:\n", "whole_ledger"),
        ("or path.stat().st_size != n_bytes:", "and False:", "whole_ledger"),
        ("if key not in live]", "if key in live]", "mends"),
    ),
    *_of(
        "store/merge.py", DISK,
        ("stored_json(inputs)) != key:", "stored_json(inputs)) == 0:", "no_fastconv_wrote"),
        ("isinstance(reason, str) if value is None else is_number(value)", "True", "no_fastconv_wrote"),
        ("isinstance(nusd, int) and 0 <= nusd < 2**53", "isinstance(nusd, int)", "costs"),
        ("        if key not in known:\n            require_sound", "        if False:\n            require_sound", "no_fastconv_wrote"),
    ),
    *_of(
        "cli/common.py", DISK,
        ("        return READER_GONE if code in (0, 1) else code", "        return code", "reader_that_goes"),
        ("        return fault.exit_code\n", "        return code\n", "output_that"),
        ("        if fault := _output_fault(error):\n", "        if fault := None:\n", "output_that"),
        ("        if _output_fault(error) is None:\n", "        if True:\n", "output_that"),
        ("    with contextlib.suppress(OSError):  # nobody", "    with contextlib.nullcontext():  # nobody", "nobody_can"),
    ),
    *_of("cli/__init__.py", DISK, ("        require_writable(folder, option)", "        pass", "reports_that")),
    *_of(
        "recipe/toml.py", DISK,
        ("    except RecursionError:\n", "    except KeyError:\n", "beyond_reason"),
        ("    except ValueError as error:  # an", "    except KeyError as error:  # an", "beyond_reason"),
    ),
    *_of(
        "recipe/toml.py", RECIPE,
        ("    if level:\n", "    if False:\n", "without_end"),
    ),
    *_of(
        "engine/score.py", MEMORY,
        ("        if len(part) < 2:\n", "        if len(part) < 0:\n", "less_than_a_row and letters"),
        ("        parts[:0] = [part[: len(part) // 2], part[len(part) // 2 :]]\n",
         "        parts[:0] = [part[: len(part) // 2]]\n", "halved and letters"),
        ("        if not is_out_of_memory(error):\n            raise\n        return None", "        return None", "no_want"),
        ('("DefaultCPUAllocator", ', "(", "halved and letters"),
    ),
    *_of(
        "engine/generate.py", MEMORY,
        ("            row.tokens.clear()\n", "            pass\n", "while_sampling"),
        ("        on_token(-sum(len(row.tokens) for row in unfinished))\n", "", "while_sampling"),
    ),
    *_of(
        "engine/trainee.py", TRAIN,
        ("torch.isfinite(loss + norm)", "torch.isfinite(loss)", "beside_a_finite_loss"),
        ("torch.isfinite(loss + norm)", "torch.isfinite(norm)", "beside_a_finite_gradient"),
        ('"order", epoch, *chance', '"order", 0, *chance', "order_of_its_own"),
        ('"order", epoch, *chance', '"order", epoch', "order_of_its_own"),
    ),
    *_of("engine/trainee.py", TRAIN, ("        self.bad.copy_(torch.maximum(self.bad, ", "        self.bad.copy_(torch.minimum(self.bad, ", "not_finite")),
    *_of(
        "chat/__init__.py", CHAT,
        ("        plain.encode_special_tokens = True\n", "", "quoted_text"),
        ('token["special"] = token["id"] in self._control_ids', "pass", "not_marked_special"),
        ("if token.special or token.content in row}", "if token.special}", "not_marked_special"),
        ("        if any(token_id in self._control_ids for token_id in ids):\n", "        if False:\n", "no_other_way"),
        ("            if text.count(part) != 1:\n", "            if False:\n", "quoted_text"),
    ),
    *_of(
        "run/executor.py", INPUTS,
        ("list(characters), (system, user))", "list(characters))", "no_orders"),
        ("            if tokenizer.control_token_in(user):\n", "            if False:\n", "no_orders"),
    ),
    *_of("run/executor.py", MEMORY, ('halved = {"halved": self._n_halved} if', "halved = {} if", "little_memory")),
    *_of("report/record.py", MEMORY, ('if n_halved := record.facts.get("halved"):', "if n_halved := 0:", "little_memory")),
    *_of(
        "engine/same_bits.py", SAME_BITS,
        ("        _IN_ORDER.set()\n", "        pass\n", "backward_pass_alone"),
        ("            self._before.set()\n", "            pass\n", "backward_pass_alone"),
        ("        if _Settings.now() != before:", "        if False:", "no_memory"),
    ),
    *_of(
        "engine/folder.py", LOCATE,
        ('"special_tokens_map.json",\n', "\n", "may_decide"),
        ("*(path for name in indexed(folder) if", "*(path for name in () if", "below_the_folder"),
    ),
    *_of(
        "store/ledger.py", WHOLE,
        ("return abs(time.time() - lease", "return (time.time() - lease", "wrong_clock"),
        ("MAX(?, (SELECT COALESCE(MAX(started_at), 0) FROM runs))", "?", "stays_the_first"),
    ),
    *_of("store/merge.py", WHOLE, ('"SELECT key FROM stages ORDER BY rowid"', '"SELECT key FROM stages ORDER BY finished_at"', "jumps_by_a_year and back-")),
    *_of("engine/stack.py", MEMORY, ("        finally:\n            self.route.spans = spans", "        finally:\n            pass", "probe")),
    *_of(
        "serve/resident.py", SERVE,
        ("        finally:\n            waiting.gone = True", "        finally:\n            pass", "goes_midway"),
        ("            self.n_sent = len(row.tokens)", "            pass", "told_once"),
        ("if one.group == self._waiting[0].group]", "if True]", "two_clients"),
        ("            for waiting in left:", "            for waiting in ():", "waits_when_the_endpoint_ends"),
    ),
    *_of("serve/resident.py", HOSTILE, ("if len(self._waiting) >= MOST_WAITING:", "if False:", "flood")),
    *_of(
        "serve/endpoint.py", HOSTILE,
        ("if named is not None and _host_of(named) not in _LOOPBACK:", "if False:", "page_elsewhere"),
        ("(request.content_length or 0) > MAX_BODY_BYTES", "False", "gigabyte"),
    ),
    *_of(
        "serve/endpoint.py", SERVE,
        ("                if answer.finish is not None:\n                    return", "                pass", "ends_the_drawing"),
        ('listening.bind(("127.0.0.1", port))', 'listening.bind(("0.0.0.0", port))', "this_machine_alone"),
    ),
    *_of(
        "serve/protocol.py", SERVE,
        ('first if choice == 0 else seed_of("choice", first, choice)', "first", "choices_have_seeds"),
        ("if self._held.endswith(stop[:n])), default=0", "if False), default=0", "stop_sequence"),
    ),
    *_of("serve/protocol.py", HOSTILE, ("    if room < (wanted or 1):", "    if False:", "cannot_be_honoured"), ("or _asks_nothing(name, value))", "or True)", "cannot_be_honoured")),
    *_of(
        "serve/vllm.py", VLLM,
        ("if distance > probe_tolerance(self._dtype, self._recorded_as):", "if False:", "not_the_recorded"),
        ("        if found.distance(base) == 0.0:", "        if False:", "not_the_recorded"),
        ("ids[:-1] if finish == \"stop\" and ids and ids[-1] in stops else ids", "ids", "those_of_the_ledger"),
    ),
    *_of("serve/__init__.py", VLLM, ("            proofs[name] = one.prove(name)", "            proofs[name] = {}", "not_the_recorded")),
]  # fmt: skip
