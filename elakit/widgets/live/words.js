// The words of the prompt as chips; each click changes a word's role: plain word, entity, attribute, plain word.

const ROLES = { entity: "entity", attribute: "attribute of", "": "plain word" };

function render({ model, el }) {
  const root = h("div", { class: "elx ell-words", role: "group", "aria-label": "Words of the prompt" });
  const line = h("div", { class: "elx-prompt" });
  const help = h("p", { class: "elx-soft" });
  root.append(line, help);
  el.append(root);
  const draw = () => {
    const words = model.get("_words"), locked = model.get("_locked");
    const focused = [...line.querySelectorAll("button")].indexOf(document.activeElement);
    line.replaceChildren();
    for (const [i, { text, gap, role, owner, color, clickable }] of words.entries()) {
      const about = role === "attribute" ? `${ROLES[role]} ${owner}` : ROLES[role];
      const kind = role ? ` elx-${role}` : " elx-word";
      line.append(gap ? " " : "");
      if (!clickable) {
        line.append(h("span", { class: "elx-word" }, text));
        continue;
      }
      const next = { entity: "an attribute", attribute: "a plain word", "": "an entity" }[role];
      line.append(
        h(
          "button",
          {
            type: "button", class: `elx-chip${kind}`, "--c": color, disabled: locked, "aria-label": `${text}: ${about}`,
            title: locked ? about : `${about}; click to make it ${next}`, onclick: () => model.send({ click: i }),
          },
          text,
        ),
      );
    }
    line.querySelectorAll("button")[focused]?.focus(); // the clicked button has been replaced
    help.hidden = !words.length;
    say(help, "Underlined: entities. Dotted: attributes. Click a word to change its role.");
  };
  for (const name of ["_words", "_locked"]) model.on(`change:${name}`, draw);
  draw();
  return () => {
    for (const name of ["_words", "_locked"]) model.off(`change:${name}`, draw);
  };
}

export default { render };
