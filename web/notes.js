// Links in the notes of the pack's workflows: the browser's dark blue and purple cannot be read on their brown.
import { app } from "../../scripts/app.js";

const BACKGROUND = "#3a3328"; // of the notes that workflows/source/graph.py makes
const NAME = "truepose-note";

app.registerExtension({
  name: "TruePose.Notes",
  setup() {
    const style = document.createElement("style");
    style.textContent = `.${NAME} a, .${NAME} a:visited { color: #8cc8ff; }`;
    document.head.append(style);
  },
  loadedGraphNode(node) {
    if (node.type === "MarkdownNote" && node.bgcolor === BACKGROUND) {
      node.widgets?.[0]?.element?.classList.add(NAME);
    }
  },
});
