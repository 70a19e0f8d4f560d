"""A complete tool loop: tool_loop.py [ADDRESS] [QUESTION]

The model is told of a tool, calls it, gets the result, and answers with it. All in one session, so that every
turn sends only what is new.
"""
import sys

from deltad import Client


def get_weather(city):
    return '{"city": "%s", "temperature": 21, "unit": "C"}' % city


FUNCTIONS = {"get_weather": get_weather}
TOOLS = [{"type": "function", "function": {
    "name": "get_weather", "description": "Get the weather for a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "City name"}}, "required": ["city"]}}}]


def main(address="unix:///run/deltad/deltad.sock", question="What is the weather in Paris?"):
    with Client(address) as client, client.session(tools=TOOLS) as session:
        new = [{"role": "user", "content": question}]
        for _ in range(8):  # a model may call again; not for ever
            reply = session.ask(new, temperature=0)
            calls = [c for c in reply.tool_calls if c.complete]
            if not calls:
                print(reply.text)
                return 0
            new = []
            for call in calls:
                print(f"-> {call.name}({call.arguments_json})")
                result = FUNCTIONS[call.name](**call.arguments)
                new.append({"role": "tool", "tool_call_id": call.id, "content": result})
        return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
